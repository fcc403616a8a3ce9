"""Importance: two collectors that agree, kinds of token kept apart, and files that stock llama.cpp reads."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import tiny as builders
from gguf import GGUFReader, GGUFWriter

from ldrt_edge import artifact
from ldrt_edge.convert.gguf import convert, write_text
from ldrt_edge.convert.importance import Tally, imatrix_path, importance, read_imatrix
from ldrt_edge.convert.planned import quantize_planned
from ldrt_edge.convert.quantize import Gguf, Importance, quantize
from ldrt_edge.convert.quantizer import Wanted, read_back, run_quantizer
from ldrt_edge.convert.type_plan import TypePlan, read_type_plan
from ldrt_edge.dataset import Dataset
from ldrt_edge.errors import ArtifactError, ConfigError, DataError
from ldrt_edge.runtimes.base import FrontImage, Prompt
from ldrt_edge.train.data.phantom import phantom

VISION, PROMPT, ANSWER = range(3)

TOOL = shutil.which("llama-quantize")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return phantom(tmp_path_factory.mktemp("data") / "phantom", 4, 0, test_fraction=0.25, languages=("en",))


@pytest.mark.parametrize(
    ("family", "text"), [("llava15", "llama"), ("llava15", "smollm2"), ("llavanext", "mistral")]
)
def test_both_collectors_agree(tiny: builders.Tiny, data: Path, tmp_path: Path, family: str, text: str) -> None:
    merged = tiny(family, text)
    edge = convert(merged, tmp_path / "edge", "f32")

    torch = importance(merged, data, tmp_path / "torch", limit=8)
    llamacpp = importance(edge, data, tmp_path / "llamacpp", limit=8)

    assert artifact.read(torch).metrics["tokens"] == artifact.read(llamacpp).metrics["tokens"]
    for path in sorted(torch.glob("*.gguf")):
        wanted, found = read_imatrix(path), read_imatrix(llamacpp / path.name)
        assert wanted.keys() == found.keys()
        worst = max(float(np.abs(found[name] - mean).max() / mean.max()) for name, mean in wanted.items())
        assert worst < 1e-3, path.name
    head = "token_embd.weight" if text == "smollm2" else "output.weight"
    assert {head, "blk.0.ffn_down.weight", "mm.2.weight", "v.blk.1.attn_q.weight"} <= wanted.keys() | read_imatrix(
        imatrix_path(torch, "pooled")
    ).keys()


def test_kinds_are_weighed(tiny: builders.Tiny, data: Path, tmp_path: Path) -> None:
    out = importance(tiny("llava15", "llama"), data, tmp_path / "out", limit=8)

    pooled, balanced, answer = (read_imatrix(imatrix_path(out, name)) for name in ("pooled", "balanced", "answer"))
    kinds = [read_imatrix(out / f"only-{name}.gguf") for name in ("vision", "prompt", "answer")]
    tokens = artifact.read(out).metrics["tokens"]
    name = "blk.0.attn_q.weight"
    assert np.allclose(answer[name], kinds[ANSWER][name], rtol=1e-5)
    assert np.allclose(balanced[name], np.mean([kind[name] for kind in kinds], axis=0), rtol=1e-5)
    counts = [tokens[kind] for kind in ("vision", "prompt", "answer")]
    assert np.allclose(pooled[name], np.average([k[name] for k in kinds], axis=0, weights=counts), rtol=1e-5)
    assert tokens["vision"] == 16 * artifact.read(out).metrics["images"]
    assert np.array_equal(pooled["mm.0.weight"], answer["mm.0.weight"])  # the projector sees nothing but pictures
    assert "blk.1.ffn_down.weight" not in kinds[VISION].keys() | kinds[PROMPT].keys()  # nothing reads those outputs
    assert "blk.1.attn_k.weight" in kinds[VISION]


def test_files_follow_the_rules_of_llama_cpps_reader(tiny: builders.Tiny, data: Path, tmp_path: Path) -> None:
    """Source: `common_imatrix_load` in common/imatrix-loader.cpp and `load_imatrix` in tools/quantize/quantize.cpp."""
    merged = tiny("llava15", "llama")
    out = importance(merged, data, tmp_path / "out", limit=4)
    weights = {t.name: t for t in GGUFReader(convert(merged, tmp_path / "edge", "f32") / "model-F32.gguf").tensors}

    reader = GGUFReader(imatrix_path(out, "balanced"))

    assert reader.fields["general.type"].contents() == "imatrix"
    assert reader.fields["imatrix.datasets"].contents() == [data.name]
    assert reader.fields["imatrix.chunk_count"].contents() == artifact.read(out).metrics["questions"]
    assert reader.fields["imatrix.chunk_size"].contents() > 0
    stored = {tensor.name: tensor for tensor in reader.tensors}
    for name in {name.rpartition(".")[0] for name in stored}:
        squares, counts = stored[f"{name}.in_sum2"], stored[f"{name}.counts"]
        assert squares.tensor_type.name == counts.tensor_type.name == "F32"
        assert counts.n_elements == 1
        assert counts.data.item() == round(counts.data.item()) > 0
        if name in weights:
            assert squares.n_elements == weights[name].shape[0]


def test_nothing_is_measured_twice(tiny: builders.Tiny, data: Path, tmp_path: Path) -> None:
    merged = tiny("llava15", "llama")
    first = importance(merged, data, tmp_path / "out", limit=4)
    before = (first / artifact.MANIFEST).stat().st_mtime_ns

    importance(merged, data, tmp_path / "out", limit=4)

    assert (first / artifact.MANIFEST).stat().st_mtime_ns == before
    with pytest.raises(ArtifactError, match="other settings"):
        importance(merged, data, tmp_path / "out", limit=8)


def test_rows_are_counted_across_batches() -> None:
    image = FrontImage(np.zeros((1, 4, 4, 3), np.uint8), np.zeros((2, 1), np.int32), (4, 4), "one")
    prompt = Prompt((1, 9, 9, 5, 6), (image,), 9, (2,))
    tally = Tally(layers=2)

    def kinds(name: str, rows: int) -> Sequence[tuple[int, int, int]]:
        return list(tally.runs(name, rows))

    assert tally.expect(prompt, (7, 2)) == 0  # runs 1 | 9 9 | 5 6 7, of which the last two predict
    for rows, expected in (
        (1, [(PROMPT, 0, 1)]), (2, [(VISION, 0, 2)]), (3, [(PROMPT, 0, 1), (ANSWER, 1, 3)]),
    ):  # fmt: skip
        assert kinds("blk.0.attn_v.weight", rows) == kinds("blk.0.attn_q.weight", rows) == expected
        outputs = 2 if rows == 3 else 0
        assert kinds("blk.1.ffn_up.weight", outputs) == ([(ANSWER, 0, 2)] if outputs else [])
        assert kinds("blk.1.attn_q.weight", rows) == [run for run in expected if run[0] == ANSWER]
    assert tally.expect(Prompt((1, 9, 9, 5, 8), (image,), 9, (2,)), (7, 2)) == 4
    assert kinds("blk.0.attn_q.weight", 2) == [(ANSWER, 0, 2)]
    assert kinds("v.blk.0.attn_q.weight", 5) == [(VISION, 0, 5)]


def test_what_is_no_importance_is_refused(tiny: builders.Tiny, data: Path, tmp_path: Path) -> None:
    merged = tiny("llava15", "llama")
    with pytest.raises(ArtifactError, match="holds a dataset artefact, wanted: importance"):
        imatrix_path(data, "pooled")
    with pytest.raises(ConfigError, match="--weighting 'mean': choose one of pooled, balanced, answer"):
        imatrix_path(data, "mean")
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF")
    with pytest.raises(ArtifactError, match="no importance matrix in GGUF"):
        read_imatrix(broken)
    writer = GGUFWriter(broken, "imatrix")
    writer.add_tensor("blk.0.attn_q.weight.in_sum2", np.full((1, 4), -1, np.float32))
    writer.add_tensor("blk.0.attn_q.weight.counts", np.ones((1, 1), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ArtifactError, match=r"blk\.0\.attn_q\.weight holds no mean squares"):
        read_imatrix(broken)
    only_tests = phantom(tmp_path / "tests", 2, 0, test_fraction=1.0, languages=("en",))
    with pytest.raises(DataError, match="not measured on test rows"):
        importance(merged, only_tests, tmp_path / "out")


@pytest.fixture(scope="module")
def wide(tiny: builders.Tiny, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Importance]:
    """A model whose rows divide by 256, and what matters in it."""
    merged = tiny("llava15", "llama", hidden=256)
    return merged, Importance(importance(merged, data, tmp_path_factory.mktemp("wide") / "importance"))


def test_stock_llama_cpp_quantises_with_it(wide: tuple[Path, Importance], tmp_path: Path) -> None:
    merged, given = wide

    plain = quantize(merged, tmp_path / "plain", "Q3_K_S")
    weighed = quantize(merged, tmp_path / "weighed", "Q3_K_S", importance=given)

    assert kld(weighed) < kld(plain)
    assert artifact.identity(given.folder) in artifact.read(weighed).inputs
    sizes = [artifact.read(folder).metrics["quantized"]["bytes"] for folder in (plain, weighed)]
    assert abs(sizes[0] - sizes[1]) < 1000


@pytest.mark.slow
@pytest.mark.skipif(TOOL is None, reason="llama.cpp's llama-quantize is not on the path")
def test_llama_cpps_own_tool_reads_it_and_rounds_the_same(wide: tuple[Path, Importance], tmp_path: Path) -> None:
    merged, given = wide
    imatrix, theirs = imatrix_path(given.folder, given.weighting), tmp_path / "theirs.gguf"
    full = convert(merged, tmp_path / "full", "f32") / "model-F32.gguf"

    done = subprocess.run(
        [str(TOOL), "--imatrix", imatrix, full, theirs, "Q4_K_M", "1"], capture_output=True, text=True, check=True
    )

    assert f"loaded {len(read_imatrix(imatrix))} importance matrix entries" in done.stdout + done.stderr
    ours = quantize(merged, tmp_path / "ours", "Q4_K_M", importance=given) / "model-Q4_K_M.gguf"
    expected, found = ({t.name: t for t in GGUFReader(path).tensors} for path in (ours, theirs))
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(tensor.data, found[name].data, err_msg=name)


@pytest.mark.parametrize("type_", ["IQ3_XXS", "IQ2_XS", "Q2_K_S"])
def test_it_unlocks_low_types(wide: tuple[Path, Importance], tmp_path: Path, type_: str) -> None:
    merged, given = wide
    source = tmp_path / "full.gguf"
    write_text(merged, source, "f16")

    run_quantizer(source, tmp_path / "out.gguf", Wanted(type_, {}, imatrix_path(given.folder, "balanced")), 1)

    assert not read_back(tmp_path / "out.gguf", type_).fallbacks
    with pytest.raises(ArtifactError, match="this quantization requires an imatrix"):
        run_quantizer(source, tmp_path / "none.gguf", Wanted(type_), 1)


def test_every_matrix_gets_the_type_of_the_plan(wide: tuple[Path, Importance], tmp_path: Path) -> None:
    merged, given = wide
    path = tmp_path / "plan.yaml"
    path.write_text(
        "format: ldrt-edge/plan/1\nmodel:\n  blk.0.attn_v.weight: Q6_K\n  blk.*.attn_*: IQ3_XXS\n  '*': q4_k\n"
        "mmproj:\n  mm.*: Q8_0\n  v.blk.0.*: Q6_K\n  '*': F16\n"
    )

    out = quantize_planned(merged, tmp_path / "edge", read_type_plan(path, "gguf"), Gguf(given))

    model = {t.name: t.tensor_type.name for t in GGUFReader(out / "model-PLANNED.gguf").tensors if len(t.shape) == 2}
    mmproj = {t.name: t.tensor_type.name for t in GGUFReader(out / "mmproj-PLANNED.gguf").tensors if len(t.shape) == 2}
    assert model.pop("blk.0.attn_v.weight") == "Q6_K"
    assert {type_ for name, type_ in model.items() if "attn" in name} == {"IQ3_XXS"}
    assert {type_ for name, type_ in model.items() if "attn" not in name} == {"Q4_K"}
    assert (mmproj["mm.2.weight"], mmproj["v.blk.0.ffn_up.weight"], mmproj["v.blk.1.ffn_up.weight"]) == (
        "Q8_0", "Q6_K", "F16",
    )  # fmt: skip
    assert mmproj["v.position_embd.weight"] == "F32"
    assert kld(out) < 1
    assert not [path.name for path in out.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("model: {'*': Q4_K}", "its first line should be"),
        ("format: ldrt-edge/plan/1\nmodel: {'*': Q4_K_M}", r"\*: Q4_K_M is none .*types under 'mmproj'"),
        ("format: ldrt-edge/plan/1\nmodel: {'*': Q4_K_M}\nmmproj: {'*': Q4_K}", r"Q4_K_M is none .*\*: Q4_K is none"),
        ("format: ldrt-edge/plan/1\nto: gguf\nmodel: {'*': affine-4-g64}\nmmproj: {'*': F16}", "affine-4-g64 is none"),
        ("format: ldrt-edge/plan/1\nto: mlx\nmodel: {'*': f16}\nvision: {'*': f16}", "for mlx, and this is --to gguf"),
        ("format: [", "cannot be read"),
    ],
)
def test_what_is_no_plan_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=reason):
        read_type_plan(path, "gguf")


def test_a_plan_must_fit_the_model(tiny: builders.Tiny, tmp_path: Path) -> None:
    types = {"blk.0.attn_q": "Q4_K", "blk.7.*": "Q8_0", "blk.*": "Q8_0", "output": "Q8_0"}
    plan = TypePlan("gguf", {"model": types, "mmproj": {"v.*": "F16"}})
    with pytest.raises(ConfigError) as caught:
        quantize_planned(tiny("llava15", "llama"), tmp_path / "edge", plan, Gguf())
    for problem in (
        "token_embd.weight has no type", "blk.0.attn_q.weight: its rows of 64 do not divide into Q4_K",
        "blk.7.* fits no matrix of 'model'", "mm.2.weight has no type",
    ):  # fmt: skip
        assert problem in str(caught.value)


def test_types_that_want_an_importance_are_refused_at_once(wide: tuple[Path, Importance], tmp_path: Path) -> None:
    merged, given = wide
    types = {"blk.0.ffn_up": "IQ2_XXS", "blk.1.attn_q": "IQ3_XXS", "*": "Q8_0"}
    plan = TypePlan("gguf", {"model": types, "mmproj": {"*": "F16"}})
    with pytest.raises(ConfigError) as caught:
        quantize_planned(merged, tmp_path / "edge", plan, Gguf())
    for problem in ("blk.0.ffn_up.weight: IQ2_XXS wants --importance: run ldrt-edge", "blk.1.attn_q.weight: IQ3_XXS"):
        assert problem in str(caught.value)
    assert quantize_planned(merged, tmp_path / "edge", plan, Gguf(given)).is_dir()


def test_it_says_what_it_is_of_and_what_it_was_computed_in(tiny: builders.Tiny, data: Path, tmp_path: Path) -> None:
    out = importance(tiny("llava15", "llama"), data, tmp_path / "out", limit=4)
    shown = (out / "pictures.txt").read_text().split()
    assert shown == sorted(shown) and len(shown) == artifact.read(out).metrics["images"]
    assert set(shown) <= {row.image_sha256 for row in Dataset(data).rows("train")}
    assert artifact.read(out).metrics["computed_in"].startswith("float32 on ")


def kld(edge: Path) -> float:
    return float(artifact.read(edge).metrics["fidelity"]["mean_kld"])
