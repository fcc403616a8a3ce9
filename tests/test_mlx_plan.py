"""MLX folders by plan: one language with GGUF, rounding as it is stored, damage foreseen, less lost than by presets."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import tiny as builders
from click.testing import CliRunner

from ldrt_edge import artifact
from ldrt_edge.cli import cli
from ldrt_edge.convert import budget, mlx, planned
from ldrt_edge.convert.allocate import allocate
from ldrt_edge.convert.mlx import Mlx, quantize
from ldrt_edge.convert.mlx_plan import AFFINE
from ldrt_edge.convert.planned import quantize_planned
from ldrt_edge.convert.sensitivity import Matrix, sensitivities
from ldrt_edge.convert.source import open_source
from ldrt_edge.convert.type_plan import TypePlan, nbytes, read_type_plan, write_type_plan
from ldrt_edge.errors import ConfigError
from ldrt_edge.release import Verdict
from ldrt_edge.train.data.phantom import phantom

LAYER = "language_model.model.layers"
START = "format: ldrt-edge/plan/1\nto: mlx\n"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return phantom(tmp_path_factory.mktemp("data") / "phantom", 12, 0, test_fraction=0.5, languages=("en",))


@pytest.fixture(scope="module")
def wide(tiny: builders.Tiny) -> Path:
    return tiny("llava15", "llama", hidden=256)


@pytest.fixture(scope="module")
def measured(wide: Path, data: Path) -> list[Matrix]:
    return sensitivities(open_source(wide), data, Mlx(), limit=8)


def weights(folder: Path) -> dict[str, mx.array]:
    return {name: value for path in folder.glob("*.safetensors") for name, value in mx.load(str(path)).items()}


def test_every_type_rounds_as_it_is_stored(wide: Path, tmp_path: Path) -> None:
    source = open_source(wide)
    names = [matrix.name for matrix in Mlx().matrices(source)["model"]]
    assert len(names) >= 16
    for given in (list(AFFINE)[:9], list(AFFINE)[9:]):
        types = dict(zip(names, [*given, *["f16"] * len(names)], strict=False))
        folder = tmp_path / given[0]
        folder.mkdir()
        plan = TypePlan("mlx", {"model": types, "vision": {"*": "f16"}})

        Mlx().write(source, plan, folder, tmp_path)

        stored, config = weights(folder), json.loads((folder / "config.json").read_text())["quantization"]
        for matrix in Mlx().matrices(source)["model"]:
            type_, base = types[matrix.name], matrix.name.removesuffix("weight")
            parts = [stored[base + part] for part in ("weight", "scales", "biases") if base + part in stored]
            assert sum(part.nbytes for part in parts) == nbytes(type_, int(np.prod(matrix.shape)))
            found = parts[0].astype(mx.float32)
            if type_ != "f16":
                own = config.get(base.removesuffix("."), config)
                assert (own["bits"], own["group_size"]) == (AFFINE[type_].bits, AFFINE[type_].group_size)
                found = mx.dequantize(
                    parts[0], *(part.astype(mx.float32) for part in parts[1:]),
                    group_size=own["group_size"], bits=own["bits"],
                )  # fmt: skip
            rounded = Mlx().rounded(matrix.name, source.weights.read(matrix.source), type_)
            assert np.array_equal(np.array(found), rounded), type_


def test_more_bits_and_smaller_groups_do_less_damage(measured: list[Matrix]) -> None:
    for matrix in measured:
        damage = {option.type: option.damage for option in matrix.options}
        assert damage.keys() == ({*AFFINE, "f16"} if matrix.part == "model" else {
            "affine-6-g32", "affine-6-g64", "affine-6-g128", "affine-8-g32", "affine-8-g64", "affine-8-g128", "f16",
        })  # fmt: skip
        assert 0 < damage["f16"] < damage["affine-8-g32"] < damage["affine-6-g32"] < damage["affine-6-g128"] < 10
    assert {"language_model.lm_head.weight", "language_model.model.embed_tokens.weight"} <= {m.name for m in measured}


def test_damage_is_foreseen_and_less_than_a_presets(wide: Path, measured: list[Matrix], tmp_path: Path) -> None:
    preset = quantize(wide, tmp_path / "preset", "mixed_4_6")
    size = sum(value.nbytes for value in weights(preset).values())
    model = [matrix for matrix in measured if matrix.part == "model"]
    rest = sum(nbytes("f16", matrix.weights) for matrix in measured if matrix.part == "vision")

    chosen = allocate("mlx", model, Mlx().fixed_bytes(open_source(wide)) + rest, target_bytes=size)
    whole = replace(chosen, parts={**chosen.parts, "vision": {"*": "f16"}})
    ours = quantize_planned(wide, tmp_path / "ours", whole, Mlx())

    assert 0.99 * size < sum(value.nbytes for value in weights(ours).values()) == chosen.expected["bytes"] <= size
    klds = [artifact.read(folder).metrics["fidelity"]["mean_kld"] for folder in (ours, preset)]
    assert klds[0] < 0.75 * klds[1]
    assert 0.5 < chosen.expected["kld"] / klds[0] < 2


def test_a_plan_made_on_the_command_line_becomes_a_folder(wide: Path, data: Path, tmp_path: Path) -> None:
    path, out = tmp_path / "plan.yaml", tmp_path / "edge"
    words = ["plan", str(wide), "--to", "mlx", "--data", str(data), "--bpw", "5", "--limit", "4", "--out", str(path)]

    made = CliRunner().invoke(cli, words, catch_exceptions=False)
    done = CliRunner().invoke(
        cli, ["quantize", str(wide), "--to", "mlx", "--plan", str(path), "--out", str(out)], catch_exceptions=False
    )

    assert (made.stdout.strip(), done.stdout.strip()) == (str(path), str(out))
    read = read_type_plan(path, "mlx")
    manifest = artifact.verify(out, "mlx")
    assert manifest.config["plan"] == read.parts
    matrices, fixed = Mlx().matrices(open_source(wide)), Mlx().fixed_bytes(open_source(wide))
    most = 5 / 8 * sum(int(np.prod(matrix.shape)) for part in matrices.values() for matrix in part) + fixed
    assert 0.98 * most < sum(value.nbytes for value in weights(out).values()) <= most
    again = tmp_path / "again.yaml"
    write_type_plan(read, again)
    assert read_type_plan(again, "mlx") == read


def test_a_killed_run_goes_on(wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = TypePlan("mlx", {"model": {"*": "affine-8-g64"}, "vision": {"*": "f16"}})
    split = mlx._shards
    monkeypatch.setattr(mlx, "_shards", lambda tensors, _limit: split(tensors, 1_000_000))
    save, saved, killed_after = mx.save_safetensors, list[str](), [2]

    def killed(path: str, *rest: object, **options: object) -> None:
        if len(saved) in killed_after:
            killed_after.clear()
            raise KeyboardInterrupt
        save(path, *rest, **options)
        saved.append(path)

    monkeypatch.setattr(mx, "save_safetensors", killed)
    with pytest.raises(KeyboardInterrupt):
        quantize_planned(wide, tmp_path / "edge", plan, Mlx())
    assert len(saved) == 2

    out = quantize_planned(wide, tmp_path / "edge", replace(plan, expected={"kld": 1.0}), Mlx())

    assert len(saved) == len(set(saved)) > 3, "what was there was not written again"
    assert len(list(out.glob("*.safetensors"))) == len(saved)
    assert artifact.verify(out, "mlx").metrics["fidelity"]["mean_kld"] < 0.01


def test_the_smallest_within_budget_is_kept(
    wide: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget, "BITS", (8.5, 7.0, 6.0))
    released = iter((True, True, False))

    def judge(folder: Path) -> Verdict:
        assert (folder / "config.json").is_file()
        return Verdict(next(released), "as planned", 1.0, 0.0, 0.0, 0.0, None, 0.0, 0.0, 9, 9, None)

    out = tmp_path / "edge"
    verdict = budget.quantize_to_budget(wide, out, data, Mlx(), judge, {"max_loss": 1.0}, limit=4)

    steps = artifact.verify(out, "mlx").metrics["search"]
    assert verdict.released and [step["released"] for step in steps] == [True, True, False]
    assert sum(path.stat().st_size for path in out.glob("*.safetensors")) == steps[1]["bytes"] < steps[0]["bytes"]
    assert read_type_plan(out / "plan.yaml", "mlx").parts.keys() == {"model", "vision"}


@pytest.mark.parametrize(
    ("text", "reasons"),
    [
        ("format: ldrt-edge/plan/1\nmodel: {'*': Q4_K}\nmmproj: {'*': F16}", ["a plan for gguf, and this is --to mlx"]),
        (START + "model: {'*': affine-4-g64}", ["wants a list of types under 'vision'"]),
        (
            START + "model: {'*': affine-7-g64, a: Q4_K}\nvision: {'*': affine-4-g64}\nmmproj: {'*': f16}",
            ["affine-7-g64 is none of", "a: Q4_K is none of", "*: affine-4-g64 is none of", "'mmproj' is no part"],
        ),
    ],
)
def test_what_is_no_plan_for_mlx_is_refused(tmp_path: Path, text: str, reasons: list[str]) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_type_plan(path, "mlx")
    for reason in reasons:
        assert reason in str(caught.value)


def test_a_plan_must_fit_the_model(tiny: builders.Tiny, tmp_path: Path) -> None:
    model = {f"{LAYER}.0.mlp.up_proj": "affine-4-g128", f"{LAYER}.9.*": "f16", f"{LAYER}.*.weight": "affine-4-g64"}
    plan = TypePlan("mlx", {"model": model, "vision": {"multi_modal_projector.*": "affine-8-g32"}})
    with pytest.raises(ConfigError) as caught:
        quantize_planned(tiny("llava15", "llama"), tmp_path / "edge", plan, Mlx())
    for problem in (
        f"{LAYER}.0.mlp.up_proj.weight: its rows of 64 do not divide into affine-4-g128",
        "language_model.lm_head.weight has no type", f"{LAYER}.9.* fits no matrix of 'model'",
        "self_attn.q_proj.weight has no type",
    ):  # fmt: skip
        assert problem in str(caught.value)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--to", "mlx", "--importance", "x", "--bpw", "4"], "--importance x does not go with --to mlx"),
        (["--to", "mlx", "--weighting", "pooled", "--bpw", "4"], "--weighting goes with --importance"),
        (["--bpw", "4"], "wants --importance"),
        (["--to", "mlx"], "one of --target-size, --bpw and --max-kld"),
    ],
)
def test_options_that_do_not_go_together(tmp_path: Path, words: list[str], reason: str) -> None:
    out = str(tmp_path / "plan.yaml")
    done = CliRunner().invoke(cli, ["plan", "merged", "--data", "data", "--out", out, *words])
    assert isinstance(done.exception, ConfigError) and reason in str(done.exception)


def test_nothing_stays_behind(wide: Path, tmp_path: Path) -> None:
    plan = TypePlan("mlx", {"model": {"*": "affine-6-g64"}, "vision": {"*": "affine-8-g64"}})
    out = quantize_planned(wide, tmp_path / "edge", plan, Mlx())
    assert not [path.name for path in out.iterdir() if path.name.startswith(".")]
    assert not (out / planned.WORK).exists()
