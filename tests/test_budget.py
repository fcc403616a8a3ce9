"""Quantising to a budget: damage foreseen, types allocated, candidates judged on held-out questions."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny as builders
import yaml
from click.testing import CliRunner
from gguf import GGUFReader, dequantize

from ldrt_edge import artifact, console
from ldrt_edge.bench.gate import Gate, judge
from ldrt_edge.bench.vqa import Answer, Sample
from ldrt_edge.cli import cli
from ldrt_edge.convert import allocate as allocation
from ldrt_edge.convert import budget
from ldrt_edge.convert.allocate import Speed, allocate, plan, useful
from ldrt_edge.convert.calibration import Calibration
from ldrt_edge.convert.gguf import write_text
from ldrt_edge.convert.importance import imatrix_path, importance, read_imatrix
from ldrt_edge.convert.mlx import Mlx
from ldrt_edge.convert.planned import check_held_out, quantize_planned
from ldrt_edge.convert.quantize import Gguf, Importance, quantize
from ldrt_edge.convert.quantizer import Wanted, run_quantizer
from ldrt_edge.convert.rounding import round_ggml
from ldrt_edge.convert.sensitivity import Matrix, Option, sensitivities
from ldrt_edge.convert.source import open_source
from ldrt_edge.convert.type_plan import PLAN_TYPES, TypePlan, read_type_plan, write_type_plan
from ldrt_edge.dataset import Dataset, DatasetWriter
from ldrt_edge.errors import ArtifactError, ConfigError, DataError
from ldrt_edge.release import read_verdict
from ldrt_edge.train.data.phantom import phantom


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return phantom(tmp_path_factory.mktemp("data") / "phantom", 12, 0, test_fraction=0.5, languages=("en",))


@pytest.fixture(scope="module")
def wide(tiny: builders.Tiny, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Importance]:
    """A model whose rows divide by 256, and what matters in it."""
    merged = tiny("llava15", "llama", hidden=256)
    return merged, Importance(importance(merged, data, tmp_path_factory.mktemp("wide") / "importance", limit=16))


@pytest.fixture(autouse=True)
def few_types(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only K-quants where a test is fast: the tables of IQ types take half a minute to make."""
    if "slow" not in request.keywords:
        few = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "F16")
        monkeypatch.setitem(PLAN_TYPES["gguf"], "model", few)


def measured(wide: tuple[Path, Importance], data: Path) -> list[Matrix]:
    merged, given = wide
    return sensitivities(open_source(merged), data, Gguf(given), limit=8)


def test_rows_round_as_in_the_file(wide: tuple[Path, Importance], tmp_path: Path) -> None:
    merged, given = wide
    path = imatrix_path(given.folder, "balanced")
    write_text(merged, tmp_path / "full.gguf", "f32")
    weights = {t.name: t.data for t in GGUFReader(tmp_path / "full.gguf").tensors}
    for type_, imatrix in (("Q4_0", None), ("IQ3_XXS", path)):
        types = dict.fromkeys([name for name in weights if name.startswith("blk.0.") and "norm" not in name], type_)
        run_quantizer(tmp_path / "full.gguf", tmp_path / "out.gguf", Wanted("Q8_0", types, imatrix), 1)
        means = read_imatrix(path) if imatrix else {}
        for tensor in GGUFReader(tmp_path / "out.gguf").tensors:
            if tensor.name in types:
                stored = dequantize(tensor.data, tensor.tensor_type)
                assert np.array_equal(stored, round_ggml(weights[tensor.name], type_, means.get(tensor.name)))


def test_damage_is_foreseen(wide: tuple[Path, Importance], data: Path, tmp_path: Path) -> None:
    merged, given = wide
    preset = quantize(merged, tmp_path / "preset", "q4", importance=given)
    stored = GGUFReader(preset / "model-Q4_K_M.gguf").tensors
    size = sum(int(tensor.n_bytes) for tensor in stored if len(tensor.shape) == 2)
    model = [matrix for matrix in measured(wide, data) if matrix.part == "model"]

    chosen = allocate("gguf", model, target_bytes=size)
    whole = replace(chosen, parts={**chosen.parts, "mmproj": {"*": "F16"}})
    ours = quantize_planned(merged, tmp_path / "ours", whole, Gguf(given))

    assert chosen.expected["bytes"] <= size
    klds = [artifact.read(folder).metrics["fidelity"]["mean_kld"] for folder in (ours, preset)]
    assert klds[0] < 0.75 * klds[1]
    assert 0.5 < chosen.expected["kld"] / klds[0] < 2


@pytest.mark.slow
def test_every_type_that_rows_admit_is_an_option(wide: tuple[Path, Importance], data: Path) -> None:
    found = measured(wide, data)
    by_name = {matrix.name: matrix for matrix in found}
    assert {"blk.1.ffn_down.weight", "output.weight", "mm.2.weight", "v.blk.1.attn_out.weight"} <= by_name.keys()
    types = {option.type for option in by_name["blk.0.attn_q.weight"].options}
    assert {"IQ2_XXS", "IQ4_XS", "Q4_K", "Q5_1", "F16"} <= types
    assert {option.type for option in by_name["mm.0.weight"].options} == {"Q6_K", "Q8_0", "F16"}
    for matrix in found:
        damage = {option.type: option.damage for option in matrix.options}
        assert 0 < damage["F16"] < damage["Q8_0"] < damage["Q6_K"] < 10


def test_allocation_is_the_best_there_is() -> None:
    rng = np.random.default_rng(0)
    matrices = [
        Matrix(str(i), "model", 100, tuple(Option(str(j), int(rng.integers(1, 90)), rng.random()) for j in range(4)))
        for i in range(5)
    ]
    combinations = list(itertools.product(*(matrix.options for matrix in matrices)))
    for target in (120, 180, 240):
        fitting = [c for c in combinations if sum(o.nbytes for o in c) <= target]
        best = min(sum(option.damage for option in c) for c in fitting)
        chosen = allocate("gguf", matrices, target_bytes=target + 7, fixed=7)
        assert chosen.expected["kld"] == pytest.approx(best, rel=2e-3)
        assert chosen == allocate("gguf", matrices, target_bytes=target + 7, fixed=7)
        smallest = min(sum(o.nbytes for o in c) for c in combinations if sum(o.damage for o in c) <= best + 1e-9)
        assert allocate("gguf", matrices, max_damage=best + 1e-9).expected["bytes"] <= smallest * 1.002
    with pytest.raises(ConfigError, match=r"the least possible is 0\.00 MB"):
        allocate("gguf", matrices, target_bytes=5)
    with pytest.raises(ConfigError, match="the least possible is an estimated KLD"):
        allocate("gguf", matrices, max_damage=0.0)


def test_a_speed_bounds_what_a_token_reads() -> None:
    rng = np.random.default_rng(0)
    matrices = [
        Matrix(str(i), "model", 100, tuple(Option(str(j), int(rng.integers(1, 90)), rng.random()) for j in range(4)))
        for i in range(5)
    ]
    read, speed = {"0", "1", "2"}, Speed(tokens_per_s=1e7, gb_per_s=1.0)  # 100 bytes a token
    combinations = list(itertools.product(*(matrix.options for matrix in matrices)))
    fitting = [c for c in combinations if sum(o.nbytes for o in c[:3]) <= 100]

    alone = allocate("gguf", matrices, speed=speed, read=read)
    sized = allocate("gguf", matrices, target_bytes=150, speed=speed, read=read)

    assert alone.expected["kld"] == pytest.approx(min(sum(o.damage for o in c) for c in fitting), rel=2e-3)
    small = [c for c in fitting if sum(o.nbytes for o in c) <= 150]
    assert sized.expected["kld"] == pytest.approx(min(sum(o.damage for o in c) for c in small), rel=2e-3)
    assert alone.expected["tokens_per_s_at_most"] >= 1e7
    with pytest.raises(ConfigError, match=r"the least possible is \S+ s a token"):
        allocate("gguf", matrices, speed=Speed(1e9, 1.0), read=read)
    slow = [Matrix("0", "model", 100, (Option("a", 90, 0.1), Option("b", 10, 0.9)))]
    with pytest.raises(ConfigError, match="cannot be met together"):
        allocate("gguf", slow, max_damage=0.5, speed=Speed(2e7, 1.0), read=read)


def test_what_is_larger_and_worse_is_no_option() -> None:
    small, same, worse, good = Option("a", 1, 3.0), Option("b", 1, 2.0), Option("c", 2, 2.5), Option("d", 3, 1.0)
    assert useful([good, worse, same, small]) == [same, good]


def test_a_plan_comes_back_as_it_was_written(
    wide: tuple[Path, Importance], data: Path, tmp_path: Path
) -> None:
    (merged, given), found = wide, measured(wide, data)
    path = plan(merged, data, Gguf(given), tmp_path / "plan.yaml", bits_per_weight=6.5, limit=8)

    read = read_type_plan(path, "gguf")

    fixed = Gguf(given).fixed_bytes(open_source(merged))
    size = int(6.5 / 8 * sum(matrix.weights for matrix in found)) + fixed
    expected = allocate("gguf", found, fixed, target_bytes=size)
    assert read.parts == expected.parts
    out = quantize_planned(merged, tmp_path / "edge", read, Gguf(given))
    stored = sum(file.stat().st_size for file in out.glob("*.gguf"))
    assert expected.expected["bytes"] <= size and stored == pytest.approx(expected.expected["bytes"], rel=1e-3)
    tensors = sum(int(t.n_bytes) for file in out.glob("*.gguf") for t in GGUFReader(file).tensors)
    assert tensors < 0.995 * stored, "settings and vocabulary are part of a file"
    patterns = tmp_path / "patterns.yaml"
    write_type_plan(TypePlan("gguf", {"model": {"*": "Q8_0"}, "mmproj": {"*": "F16"}}), patterns)
    assert read_type_plan(patterns, "gguf").parts["model"] == {"*": "Q8_0"}
    with pytest.raises(ConfigError, match="one of --target-size, --bpw and --max-kld"):
        plan(merged, data, Gguf(given), tmp_path / "other.yaml", bits_per_weight=4, max_kld=0.1)
    with pytest.raises(ConfigError, match="such a file already"):
        plan(merged, data, Gguf(given), patterns, bits_per_weight=4)
    assert read_type_plan(patterns, "gguf").parts["model"] == {"*": "Q8_0"}, "a plan that somebody edited is not lost"


def test_what_was_measured_is_not_measured_again_and_bytes_are_held_first(
    wide: tuple[Path, Importance], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (merged, given), asked = wide, []
    monkeypatch.setattr(allocation, "sensitivities", lambda *a, **k: asked.append(1) or sensitivities(*a, **k))

    def planned(name: str, **bound: Any) -> TypePlan:
        return read_type_plan(plan(merged, data, Gguf(given), tmp_path / name, limit=4, **bound), "gguf")

    for bound in ({"bits_per_weight": 1.0}, {"target_bytes": 1000.0}, {"speed": Speed(1e9, 1.0)}):
        with pytest.raises(ConfigError, match="the bound cannot be met: the least possible is"):
            planned("none.yaml", **bound)
    assert not asked and not list(tmp_path.iterdir())
    eight, five = planned("a.yaml", bits_per_weight=8.0), planned("b.yaml", bits_per_weight=5.0)
    assert len(asked) == 1 and eight != five
    [kept] = tmp_path.glob("*.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.yaml", "b.yaml", kept.name]
    plan(merged, data, Gguf(given), tmp_path / "c.yaml", max_kld=0.1, limit=4, seed=1)
    assert len(asked) == 2, "another seed is another measurement"
    kept.write_text("[1]")
    with pytest.raises(ArtifactError, match=r"no sensitivities .* remove it to measure again"):
        planned("d.yaml", bits_per_weight=5.0)


def test_a_bound_is_not_overshot() -> None:
    rng = np.random.default_rng(0)
    bits = {"Q2_K": 2.63, "Q3_K": 3.44, "Q4_K": 4.5, "Q5_K": 5.5, "Q6_K": 6.56, "Q8_0": 8.5, "F16": 16}
    matrices = []
    for i in range(120):
        weights, scale = int(rng.choice([576, 1536])) * 2304, float(np.exp(rng.normal(0, 1.5)) * 1e-2)
        options = [Option(t, int(weights * b / 8), scale * 4.0 ** (2 - min(b, 12))) for t, b in bits.items()]
        matrices.append(Matrix(str(i), "model", weights, tuple(options)))
    least = sum(matrix.options[-1].damage for matrix in matrices)
    for most in (1.001 * least, 1.1 * least, 3 * least, 10 * least, 100 * least, 1e4 * least):
        assert allocate("gguf", matrices, max_damage=most).expected["kld"] <= most * 1.0005, "it has four digits"


def test_pictures_that_judge_have_not_been_measured_on(
    wide: tuple[Path, Importance], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An importance may be of any dataset: it says of which pictures, and so does what weights are fitted to."""
    merged, given = wide
    turned = tmp_path / "turned"
    with artifact.create(turned, "dataset", {}) as draft, DatasetWriter(draft.path) as writer:
        for row in Dataset(data):
            image, _ = writer.add_image(Dataset(data).image_path(row).read_bytes(), ".png")
            writer.add(replace(row, image=image, split="train" if row.split == "test" else "test"))
    own = importance(merged, turned, tmp_path / "importance", limit=4)
    gate = Gate(merged, data, max_loss=60.0, limit=8)
    for to, name in (
        (Gguf(Importance(own)), own), (Gguf(given, Calibration(turned, feedback=True, limit=4)), turned),
        (Mlx(Calibration(turned, rescale=True, limit=4)), turned),
    ):  # fmt: skip
        with pytest.raises(DataError, match=rf"{name.name} is of \d pictures that .* holds out"):
            budget.quantize_to_budget(merged, tmp_path / "edge", data, to, gate, {"max_loss": 60.0})
        with pytest.raises(DataError, match="holds out to judge by"):
            plan(merged, data, to, tmp_path / "plan.yaml", bits_per_weight=8.0)
    said: list[str] = []
    monkeypatch.setattr(console, "say", said.append)
    check_held_out(data, Gguf(given))
    older = tmp_path / "older"
    shutil.copytree(given.folder, older)
    (older / "pictures.txt").unlink()
    assert said == []
    check_held_out(data, Gguf(Importance(older)))
    assert len(said) == 1 and f"{older} does not say which pictures" in said[0]


def samples(right: list[bool], texts: list[str] | None = None) -> list[Sample]:
    texts = texts or ["same"] * len(right)
    return [
        Sample(
            id=str(i), image_sha256=str(i), group=str(i), kind="", language="en", task="", answer_type="open",
            question="", answer="", subject=Answer(text, correct, 0.0, ""), blind=None, blind_any=None, reference=None,
            flip=None, kld=None, top1=None,
        )
        for i, (correct, text) in enumerate(zip(right, texts, strict=True))
    ]  # fmt: skip


def test_only_what_is_shown_is_released() -> None:
    rng = np.random.default_rng(1)
    right = (rng.random(400) < 0.6).tolist()
    little = [r and i % 100 != 0 for i, r in enumerate(right)]
    much = [r and i % 5 != 0 for i, r in enumerate(right)]

    good = judge(samples(right), samples(little), 5.0, None)
    assert good.released and good.loss > 0 and good.loss_high <= 5
    few = judge(samples(right), samples(little), 1.5, None)
    assert not few.released and few.loss < 1.5 < few.loss_high
    assert few.needed and few.needed > 400 and f"about {few.needed} would be needed" in few.reason
    bad = judge(samples(right), samples(much), 5.0, None)
    assert not bad.released and bad.needed is None and "over budget" in bad.reason


def test_the_number_of_questions_needed_is_about_enough() -> None:
    def ask(count: int) -> budget.Verdict:
        right = [True] * count
        return judge(samples(right), samples([i % 80 != 0 for i in range(count)]), 2.0, None)

    needed = ask(800).needed
    assert needed and needed > 800
    assert ask(int(1.2 * needed)).released
    assert not ask(int(0.8 * needed)).released


def test_chance_and_few_questions_are_told_apart_from_a_loss() -> None:
    undecided = judge(samples([True] * 5 + [False] * 3 + [True] * 162), samples([False] * 5 + [True] * 165), 1.0, None)
    assert undecided.loss_low < 0 < 1 < undecided.loss < undecided.loss_high and undecided.needed is None
    assert "too few to tell" in undecided.reason and "over budget" not in undecided.reason
    won = judge(samples([True] * 9 + [False]), samples([True] * 10), 1.0, None)
    assert not won.released and won.needed and won.needed > 10
    for count in (10, 50):
        needed = judge(samples([True] * count), samples([True] * count), 1.0, None).needed
        assert needed == 381
    assert judge(samples([True] * 381), samples([True] * 381), 1.0, None).released
    assert not judge(samples([True] * 380), samples([True] * 380), 1.0, None).released


def test_no_change_and_one_lost_for_one_won_are_judged_alike() -> None:
    def about(pictures: int, lost: int, won: int) -> budget.Verdict:
        before, after = [True] * (7 * pictures), [True] * (7 * pictures)
        for place in range(lost + won):
            (after if place < lost else before)[7 * place] = False
        asked = [[replace(s, image_sha256=str(i // 7), group=str(i // 7)) for i, s in enumerate(samples(one))]
                 for one in (before, after)]  # fmt: skip
        return judge(asked[0], asked[1], 6.0, None)

    same, exchanged = about(43, 0, 0), about(43, 1, 1)
    assert same.loss_high <= exchanged.loss_high < 1.1 * same.loss_high
    assert "though no answer turned right or wrong: about 427 would be needed, on about 61 pictures" in same.reason
    assert not same.released and not exchanged.released and "though" not in exchanged.reason
    assert about(61, 0, 0).released and about(90, 1, 1).released and not about(43, 5, 2).released
    assert about(120, 5, 2).released


def test_too_few_pictures_are_told_before_anything_is_made(
    tiny: builders.Tiny, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(console, "say", said.append)
    Gate(tiny("llava15", "llama"), data, max_loss=90.0)
    assert said == []
    Gate(tiny("llava15", "llama"), data, max_loss=1.0)
    assert len(said) == 1 and "questions about 381 pictures or more" in said[0]


def test_changed_answers_count_too() -> None:
    right, texts = [True] * 300, ["same"] * 270 + ["other"] * 30
    assert judge(samples(right), samples(right, texts), 5.0, 20.0).released
    verdict = judge(samples(right), samples(right, texts), 5.0, 8.0)
    assert not verdict.released and verdict.flips == pytest.approx(10) and verdict.needed is None


def test_the_smallest_within_budget_is_released(
    wide: tuple[Path, Importance], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merged, given = wide
    monkeypatch.setattr(budget, "BITS", (8.5, 7.0, 6.6))
    gate = Gate(merged, data, max_loss=60.0, limit=8)
    sizes = iter((True, True, False))

    def stricter(edge: Path) -> budget.Verdict:
        return replace(gate(edge), released=next(sizes))

    out = tmp_path / "edge"
    verdict = budget.quantize_to_budget(merged, out, data, Gguf(given), stricter, {"max_loss": 60.0}, limit=8)

    manifest = artifact.verify(out, "gguf")
    assert verdict.released and read_verdict(manifest.metrics) == verdict
    assert [step["released"] for step in manifest.metrics["search"]] == [True, True, False]
    assert [step["bits"] for step in manifest.metrics["search"]] == [8.5, 7.0, 6.6]
    held = sum(path.stat().st_size for path in out.glob("*.gguf"))
    assert held == manifest.metrics["search"][1]["bytes"]
    assert {entry.path for entry in manifest.files} >= {"model-PLANNED.gguf", "mmproj-PLANNED.gguf", "plan.yaml"}
    assert not [path.name for path in out.iterdir() if path.name.startswith(".")]
    again = budget.quantize_to_budget(merged, out, data, Gguf(given), stricter, {"max_loss": 60.0}, limit=8)
    assert again == verdict


def test_a_killed_search_goes_on_behind_what_was_judged(
    wide: tuple[Path, Importance], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merged, given = wide
    monkeypatch.setattr(budget, "BITS", (8.5, 7.0, 6.6))
    gate, judged, estimated = Gate(merged, data, max_loss=60.0, limit=8), [], []
    monkeypatch.setattr(budget, "sensitivities", lambda *a, **k: estimated.append(1) or sensitivities(*a, **k))

    def dying(at: int) -> budget.Judge:
        def judge(edge: Path) -> budget.Verdict:
            judged.append(edge)
            if len(judged) == at:
                raise KeyboardInterrupt
            return replace(gate(edge), released=len(list(edge.glob("*.gguf"))) == 2)

        return judge

    def search(name: str, at: int = 0) -> artifact.Manifest:
        budget.quantize_to_budget(merged, tmp_path / name, data, Gguf(given), dying(at), {"max_loss": 60.0}, limit=8)
        return artifact.verify(tmp_path / name, "gguf")

    whole = search("whole")
    assert [step["bits"] for step in whole.metrics["search"]] == [8.5, 7.0, 6.6] and len(judged) == 3
    judged.clear()
    for at in (2, 3):
        with pytest.raises(KeyboardInterrupt):
            search("killed", at)
    killed = search("killed")
    assert len(judged) == 5 and len(estimated) == 2, "8.5 once, and 7.0 once more than it was cut off"
    assert killed.files == whole.files and killed.metrics["search"] == whole.metrics["search"]
    assert not [path.name for path in (tmp_path / "killed").iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("at", ["before it is written", "after it is written", "when it is published"])
def test_a_killed_search_publishes_what_was_judged(
    wide: tuple[Path, Importance], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    """A candidate that passed and was not written down is judged again, and may fail then; no disk needs hard links."""
    merged, given = wide
    monkeypatch.setattr(budget, "BITS", (8.5, 7.0))
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(PermissionError("no hard links here")))
    write, check, again = budget._write, budget.check, []

    def dying(path: Path, steps: list[Any]) -> None:
        if at == "after it is written" or len(steps) < 2:
            write(path, steps)
        if len(steps) == 2 and at != "when it is published":
            raise KeyboardInterrupt

    def verdict(released: bool) -> budget.Verdict:
        return budget.Verdict(released, "judged", 6.0, 0.0, 0.0, 1.0, None, 0.0, 0.0, 10, 10, None)

    def search() -> artifact.Manifest:
        out = tmp_path / "edge"
        budget.quantize_to_budget(
            merged, out, data, Gguf(given), lambda _: verdict(not again), {"max_loss": 6.0}, limit=4
        )
        return artifact.verify(out, "gguf")

    monkeypatch.setattr(budget, "_write", dying if at != "when it is published" else write)
    if at == "when it is published":
        monkeypatch.setattr(budget, "check", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        search()
    monkeypatch.setattr(budget, "_write", write)
    monkeypatch.setattr(budget, "check", check)
    again.append(True)
    manifest = search()

    steps = manifest.metrics["search"]
    best = [step for step in steps if step["released"]][-1]
    assert best["bits"] == (8.5 if at == "before it is written" else 7.0)
    held = sum(path.stat().st_size for path in (tmp_path / "edge").glob("*.gguf"))
    expected = yaml.safe_load((tmp_path / "edge" / "plan.yaml").read_text())["expected"]
    assert held == best["bytes"] and expected["kld"] == best["expected_kld"]
    assert not [path.name for path in (tmp_path / "edge").iterdir() if path.name.startswith(".")]


def test_a_preset_says_how_it_compares(tiny: builders.Tiny, tmp_path: Path) -> None:
    for number, words in enumerate((["--q8"], ["--to", "mlx", "--q4"])):
        out = tmp_path / str(number)
        done = CliRunner().invoke(cli, ["quantize", str(tiny("llava15", "llama")), *words, "--out", str(out)])
        found = artifact.read(out).metrics["fidelity"]
        assert f"mean KLD {found['mean_kld']:.2g}, same top token {found['top1_agreement']:.1%}" in done.stderr
        assert "--max-loss POINTS" in done.stderr and done.stdout.splitlines()[-1] == str(out)


def test_an_importance_of_another_model_is_refused(
    tiny: builders.Tiny, wide: tuple[Path, Importance], data: Path, tmp_path: Path
) -> None:
    _, given = wide
    other = tiny("llava15", "llama")
    refused = pytest.raises(ArtifactError, match=r"is of another model: .* inputs, not \d+")
    with refused:
        quantize(other, tmp_path / "edge", "q4", importance=given)
    with refused:
        plan(other, data, Gguf(given), tmp_path / "plan.yaml", bits_per_weight=6)
    eight = TypePlan("gguf", {"model": {"*": "Q8_0"}, "mmproj": {"*": "F16"}})
    with refused:
        quantize_planned(other, tmp_path / "edge", eight, Gguf(given))


def test_half_precision_is_half_precision(wide: tuple[Path, Importance], tmp_path: Path) -> None:
    half = TypePlan("gguf", {"model": {"*": "F16"}, "mmproj": {"*": "F16"}})
    out = quantize_planned(wide[0], tmp_path / "edge", half, Gguf())
    stored = {t.tensor_type.name for t in GGUFReader(out / "model-PLANNED.gguf").tensors if len(t.shape) == 2}
    assert stored == {"F16"}


def test_what_cannot_be_shown_is_not_released(
    wide: tuple[Path, Importance], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merged, given = wide
    monkeypatch.setattr(budget, "BITS", (8.5, 7.0))
    words = ["quantize", str(merged), "--importance", str(given.folder), "--data", str(data), "--max-loss", "0.5"]

    done = CliRunner().invoke(cli, [*words, "--limit", "8", "--out", str(tmp_path / "edge"), "--json"])

    assert isinstance(done.exception, ArtifactError)
    assert "not released" in str(done.exception) and "would be needed" in str(done.exception)
    release = json.loads(done.stdout.splitlines()[-1])["metrics"]["release"]
    assert release["released"] is False and release["needed"] > release["questions"]
    assert len(artifact.read(tmp_path / "edge").metrics["search"]) == 1


def test_mlx_goes_through_the_same_gate(
    wide: tuple[Path, Importance], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merged, _ = wide
    monkeypatch.setattr(budget, "BITS", (8.5,))
    words = ["quantize", str(merged), "--to", "mlx", "--data", str(data), "--max-loss", "0.5", "--limit", "8"]

    done = CliRunner().invoke(cli, [*words, "--feedback", "--out", str(tmp_path / "edge")])

    assert isinstance(done.exception, ArtifactError) and "would be needed" in str(done.exception)
    manifest = artifact.verify(tmp_path / "edge", "mlx")
    verdict = read_verdict(manifest.metrics)
    assert manifest.config["feedback"] == "96"
    assert verdict is not None and not verdict.released and verdict.questions > 0


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--q4", "--max-loss", "1"], "one of --q4"),
        (["--max-loss", "1"], "--max-loss wants --data"),
        (["--q4", "--limit", "3"], "go with --max-loss"),
        (["--q4", "--weighting", "pooled"], "goes with --importance"),
        (["--to", "mlx", "--plan", "x", "--importance", "y"], "does not go with --to mlx"),
        (["--to", "mlx", "--max-loss", "1"], "--max-loss wants --data"),
        (["--plan", "x", "--mmproj", "f16"], "go with a preset"),
        (["--to", "mlx", "--plan", "x", "--group-size", "32"], "go with a preset"),
    ],
)
def test_options_that_do_not_go_together(words: list[str], reason: str) -> None:
    done = CliRunner().invoke(cli, ["quantize", "merged", *words])
    assert isinstance(done.exception, ConfigError) and reason in str(done.exception)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--bpw", "nan"], "a number above 0"), (["--target-size", "inf"], "a number above 0"),
        (["--max-kld", "0"], "a number above 0"), (["--bpw", "4", "--max-kld", "1"], "one of --target-size"),
        ([], "one of --target-size"), (["--min-speed", "9"], "go together"),
        (["--min-speed", "9", "--bandwidth", "0"], "a number above 0"),
    ],
)  # fmt: skip
def test_a_bound_is_checked_before_anything_is_measured(tmp_path: Path, words: list[str], reason: str) -> None:
    given = ["plan", "merged", "--data", "data", "--to", "mlx", "--out"]
    done = CliRunner().invoke(cli, [*given, str(tmp_path / "plan.yaml"), *words])
    assert isinstance(done.exception, ConfigError) and reason in str(done.exception)
    lost = CliRunner().invoke(cli, [*given, str(tmp_path / "no" / "plan.yaml"), "--bpw", "4"])
    assert isinstance(lost.exception, ConfigError) and "no such folder" in str(lost.exception)


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("model:\n  blk.0.attn_q: Q8_0\n  '*': Q4_0\n  blk.0.attn_q: Q4_0\nmmproj: {'*': F16}", "blk.0.attn_q"),
        ("model: {'*': Q8_0}\nmmproj: {'*': F16}\nmodel: {'*': Q4_0}", "model"),
    ],
)
def test_a_line_that_stands_twice_is_named(tmp_path: Path, text: str, key: str) -> None:
    (tmp_path / "plan.yaml").write_text(f"format: ldrt-edge/plan/1\n{text}\n")
    with pytest.raises(ConfigError, match=rf"'{key}' stands 2 times"):
        read_type_plan(tmp_path / "plan.yaml", "gguf")


@pytest.mark.parametrize("text", ["[" * 100_000, "a: 2001-99-99", "format: ldrt-edge/plan/1\nmodel: {a: [1, 2]}"])
def test_a_plan_that_is_none_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "plan.yaml").write_text(text)
    with pytest.raises(ConfigError) as refusal:
        read_type_plan(tmp_path / "plan.yaml", "gguf")
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 2000


def test_damages_of_nothing_are_no_trouble_to_the_solver() -> None:
    idle = Matrix("a.weight", "model", 256, (Option("Q4_0", 144, 0.0), Option("Q8_0", 272, 0.0)))
    assert allocate("gguf", [idle], target_bytes=300).parts == {"model": {"a.weight": "Q4_0"}}


def test_the_gate_needs_held_out_rows_and_a_budget(tiny: builders.Tiny, data: Path, tmp_path: Path) -> None:
    merged = tiny("llava15", "llama")
    only_training = phantom(tmp_path / "training", 2, 0, test_fraction=0.0, languages=("en",))
    with pytest.raises(DataError, match="held-out rows only"):
        Gate(merged, only_training, 1.0)
    with pytest.raises(ConfigError, match="--max-loss wants more than 0 points"):
        Gate(merged, data, 0.0)
