"""Weights rescaled before rounding: the same function, stock files, and less lost on questions not seen."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import tiny as builders
import torch
from click.testing import CliRunner
from gguf import GGUFReader, dequantize

from ldrt_edge import artifact
from ldrt_edge.bench.held_out import ask
from ldrt_edge.cli import cli
from ldrt_edge.convert import awq, budget, calibration, gradients, mlx
from ldrt_edge.convert import moments as moments_module
from ldrt_edge.convert.allocate import allocate
from ldrt_edge.convert.awq import Reader, loss, search
from ldrt_edge.convert.budget import quantize_to_budget
from ldrt_edge.convert.calibration import Calibration
from ldrt_edge.convert.format import Format
from ldrt_edge.convert.gguf import write_text
from ldrt_edge.convert.gradients import Asked, prompts
from ldrt_edge.convert.importance import importance
from ldrt_edge.convert.mlx import Mlx
from ldrt_edge.convert.moments import measure
from ldrt_edge.convert.parity import parity
from ldrt_edge.convert.planned import quantize_planned
from ldrt_edge.convert.probes import probes
from ldrt_edge.convert.quantize import Gguf, Importance
from ldrt_edge.convert.quantizer import Wanted, run_quantizer
from ldrt_edge.convert.rescale import SCALES, Rescaled, groups, read_scales, write_scales
from ldrt_edge.convert.sensitivity import Matrix, sensitivities
from ldrt_edge.convert.source import Source, open_source
from ldrt_edge.convert.type_plan import TypePlan
from ldrt_edge.convert.weights import canonical
from ldrt_edge.dataset import Dataset, Row
from ldrt_edge.errors import ArtifactError, ConfigError, DataError
from ldrt_edge.fidelity import compare_logits
from ldrt_edge.front import Front
from ldrt_edge.release import Verdict
from ldrt_edge.runtimes.base import load
from ldrt_edge.runtimes.hf import HfRuntime
from ldrt_edge.train.data.phantom import phantom

LAYER = "language_model.layers.0"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return phantom(tmp_path_factory.mktemp("data") / "phantom", 8, 0, test_fraction=0.5, languages=("en",))


@pytest.fixture(scope="module")
def uneven(tiny: builders.Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose norms make some inputs much larger than others, as trained ones do; its heads share value heads."""
    return builders.uneven(tmp_path_factory.mktemp("uneven") / "model")


def some_scales(source: Source) -> dict[str, np.ndarray]:
    rng, entries = np.random.default_rng(0), source.weights.entries
    return {g.maker: rng.lognormal(0, 1, entries[g.maker].shape[0]).astype(np.float32) for g in groups(source)}


def answers(runtime: HfRuntime) -> np.ndarray:
    logits = np.concatenate([runtime.score(prompt, answer) for prompt, answer in probes(runtime.front, 2)])
    runtime.close()
    return logits


def biased(folder: Path) -> None:
    def add(tensors: dict[str, torch.Tensor]) -> None:
        generator = torch.Generator().manual_seed(0)
        matrices = {n: v for n, v in tensors.items() if "language_model" in n and n.endswith("proj.weight")}
        for name, values in matrices.items():
            tensors[name.replace("weight", "bias")] = torch.randn(len(values), generator=generator) / 4

    builders.edit_tensors(folder, add)


@pytest.mark.parametrize("text", ["llama", "mistral", "smollm2", "biases"])
def test_the_rescaled_model_is_the_same_function(tiny: builders.Tiny, copy: Callable[..., Path], text: str) -> None:
    folder = tiny("llava15", "llama" if text == "biases" else text)
    if text == "biases":
        folder = copy(folder, text_config={"attention_bias": True, "mlp_bias": True})
        biased(folder)
    source = open_source(folder)
    weights = Rescaled(source, some_scales(source))
    before, runtime, changed = answers(HfRuntime(folder, threads=1)), HfRuntime(folder, threads=1), []
    for name, parameter in runtime.model.named_parameters():
        if (key := canonical(name)) in source.weights.entries:
            values = torch.from_numpy(weights.read(key))
            changed += [key] if not torch.equal(values, parameter.data.float()) else []
            parameter.data.copy_(values)
    after = answers(runtime)

    assert len(changed) >= 2 * 9 + (2 if text != "smollm2" else 0) + (2 * 2 if text == "biases" else 0)
    assert np.abs(after - before).max() < 1e-3 * np.abs(before).max()
    up = f"{LAYER}.mlp.up_proj.weight"
    np.testing.assert_array_equal(weights.read(up, slice(3, 5)), weights.read(up)[3:5])


def test_heads_that_share_a_value_head_share_its_scales(tiny: builders.Tiny) -> None:
    source = open_source(tiny("llava15", "mistral", hidden=256))
    group = next(group for group in groups(source) if group.maker.endswith("v_proj.weight"))
    assert group.readers == (f"{LAYER}.self_attn.o_proj.weight",)
    columns = group.columns(np.arange(128, dtype=np.float32)).reshape(8, 32)  # 8 heads, 4 value heads, 32 wide
    np.testing.assert_array_equal(columns[0], columns[1])
    np.testing.assert_array_equal(columns[2:4], np.broadcast_to(np.arange(32, 64), (2, 32)))


@pytest.mark.parametrize(("to", "type_"), [(Mlx(), "affine-4-g64"), (Gguf(), "Q4_K")])
def test_no_group_loses_more_on_what_it_was_fitted_to(
    uneven: Path, data: Path, tmp_path: Path, to: Format, type_: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(uneven)
    matrices = to.matrices(source)["model"]
    types = dict.fromkeys([matrix.name for matrix in matrices], type_)
    moments = measure(source, data, Calibration(data, limit=8).rows(), tmp_path)
    monkeypatch.setattr(awq, "_ROWS", 1 << 20)
    found = search(source, to, matrices, types, moments)

    named, factors = {matrix.source: matrix.name for matrix in matrices}, []
    for group in groups(source):
        readers = [Reader(named[name], type_, source.weights.read(name), moments[name]) for name in group.readers]
        ones = np.ones(source.weights.entries[group.maker].shape[0], np.float32)
        plain = sum(  # by the weights that the export gets
            float(np.einsum("ri,ij,rj", error, r.moments, error)) / len(error)
            for r in readers for error in [to.rounded(r.name, r.rows, type_) - r.rows]
        )  # fmt: skip
        assert loss(group, readers, to, ones) == pytest.approx(plain, rel=1e-3)
        factors.append(loss(group, readers, to, found.get(group.maker, ones)) / plain)
    assert max(factors) <= 1.001 and sum(factor < 0.7 for factor in factors) >= 4, "behind the norms that are uneven"


@pytest.mark.parametrize(("to", "type_"), [("mlx", "affine-6-g64"), ("gguf", "Q5_K")])
def test_less_is_lost_on_questions_that_were_not_seen(
    uneven: Path, data: Path, tmp_path: Path, to: str, type_: str
) -> None:
    asked = ask(Front.load(uneven), Dataset(data), None, 0, {})
    vision = {"vision": {"*": "f16"}} if to == "mlx" else {"mmproj": {"*": "F16"}}
    plan = TypePlan("mlx" if to == "mlx" else "gguf", {"model": {"*": type_}, **vision})
    ways = (None, Calibration(data, rescale=True, limit=16), Calibration(data, True, True, limit=16))
    formats: list[Format] = [Mlx(way) if to == "mlx" else Gguf(calibration=way) for way in ways]
    folders = [quantize_planned(uneven, tmp_path / str(i), plan, one) for i, one in enumerate(formats)]

    logits = []
    for runtime in (HfRuntime(uneven, threads=1), *(load(folder, threads=1) for folder in folders)):
        logits.append(np.concatenate([runtime.score(question.prompt, question.answer) for question in asked]))
        runtime.close()

    plain, rescaled, both = (float(compare_logits(logits[0], other).kld.mean()) for other in logits[1:])
    assert max(rescaled, both) < 0.8 * plain
    manifests = [artifact.verify(folder, to) for folder in folders]
    for manifest in manifests[1:]:
        assert manifest.metrics["quantized"] == manifests[0].metrics["quantized"], "the same types in as many bytes"
        assert {f.path for f in manifest.files} == {f.path for f in manifests[0].files} | {SCALES}
    assert [m.config.get("rescale") for m in manifests] == [None, "16", "16"]
    assert len(manifests[1].inputs) == len(manifests[0].inputs) + 1
    if to == "mlx":
        assert (folders[0] / "config.json").read_text() == (folders[1] / "config.json").read_text()

    [pair] = parity(uneven, [folders[1]])
    assert pair.stage is None
    (folders[1] / SCALES).unlink()  # without it, no tensor of a group is the source's
    [pair] = parity(uneven, [folders[1]])
    assert pair.stage == "logits" and pair.fault is not None and "off its source" in pair.fault


def test_plans_are_made_for_fitted_weights(uneven: Path, data: Path, tmp_path: Path) -> None:
    source, fitted = open_source(uneven), Mlx(Calibration(data, True, True, limit=16))
    plain = {matrix.name: matrix for matrix in sensitivities(source, data, Mlx(), limit=8)}
    found = sensitivities(source, data, fitted, limit=8, work=tmp_path)

    def damage(matrix: Matrix) -> float:
        return next(option.damage for option in matrix.options if option.type == "affine-4-g64")

    language = [matrix for matrix in found if matrix.part == "model" and "embed_tokens" not in matrix.name]
    assert sum(map(damage, language)) < 0.8 * sum(damage(plain[matrix.name]) for matrix in language)

    fixed, size = Mlx().fixed_bytes(source), sum(matrix.weights for matrix in found) * 7.5 / 8
    plan = allocate("mlx", found, fixed, target_bytes=fixed + size)
    out = quantize_planned(uneven, tmp_path / "edge", plan, fitted)
    assert 0.2 < plan.expected["kld"] / artifact.read(out).metrics["fidelity"]["mean_kld"] < 2.5


def test_plans_are_tried_on_pictures_that_weights_were_not_fitted_to(
    tiny: builders.Tiny, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[set[str]] = []

    def watched(runtime: HfRuntime, data: Path, rows: Sequence[Row]) -> list[Asked]:
        asked.append({row.image_sha256 for row in rows})
        return prompts(runtime, data, rows)

    monkeypatch.setattr(gradients, "prompts", watched)
    monkeypatch.setattr(moments_module, "prompts", watched)
    source, calibration = open_source(tiny("llava15", "llama")), Calibration(data, feedback=True)
    sensitivities(source, data, Mlx(calibration), work=tmp_path)
    fitted_to, tried_on = asked
    assert len(fitted_to) >= 2 and tried_on and not fitted_to & tried_on

    one = phantom(tmp_path / "few", 2, 0, test_fraction=0.5, languages=("en",))
    with pytest.raises(DataError, match="none is left"):
        sensitivities(source, one, Mlx(Calibration(one, feedback=True)), work=tmp_path / "work")


def test_what_was_scaled_can_be_unscaled(uneven: Path) -> None:
    source = open_source(uneven)
    rescaled, some = Rescaled(source, some_scales(source)), slice(None, None, 3)
    for name in (f"{LAYER}.self_attn.{kind}_proj.weight" for kind in "qvo"):
        given = rescaled.unscaled(name, rescaled.read(name)[some], some)
        np.testing.assert_allclose(given, source.weights.read(name)[some], rtol=1e-5)


def test_a_search_fits_the_weights_of_every_candidate(
    tiny: builders.Tiny, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget, "BITS", (8.5, 6.0))
    judged: list[bytes] = []

    def judge(folder: Path) -> Verdict:
        judged.append((folder / SCALES).read_bytes())
        return Verdict(len(judged) == 1, "as planned", 1.0, 0.0, 0.0, 0.0, None, 0.0, 0.0, 9, 9, None)

    to, out = Mlx(Calibration(data, True, True, limit=8)), tmp_path / "edge"
    assert quantize_to_budget(tiny("llava15", "llama"), out, data, to, judge, {"max_loss": 1.0}, limit=4).released
    assert len(judged) == 2 and (out / SCALES).read_bytes() == judged[0]
    assert artifact.verify(out, "mlx").config["rescale"] == "8" and not list(out.rglob("*.npy"))


def test_importance_follows_the_inputs(uneven: Path, data: Path, tmp_path: Path) -> None:
    source, given = open_source(uneven), Importance(importance(uneven, data, tmp_path / "importance", limit=8))
    types = {"model": {"*": "Q4_K"}, "mmproj": {"*": "F16"}}
    to = Gguf(given, Calibration(data, rescale=True, limit=8))
    folder = tmp_path / "edge"
    folder.mkdir()

    to.write(source, TypePlan("gguf", types), folder, tmp_path / "work")

    weights = Rescaled(source, read_scales(source, folder / SCALES))
    matrices = [matrix for matrix in to.matrices(source)["model"] if matrix.source in weights.columns]
    fitted = to.rescaled({matrix.name: weights.columns[matrix.source] for matrix in matrices})
    name, key = "blk.0.ffn_gate.weight", f"{LAYER}.mlp.gate_proj.weight"
    [stored] = [tensor for tensor in GGUFReader(folder / "model-PLANNED.gguf").tensors if tensor.name == name]
    values = np.asarray(dequantize(stored.data, stored.tensor_type))
    np.testing.assert_array_equal(values, fitted.rounded(name, weights.read(key), "Q4_K"))
    assert not np.array_equal(values, to.rounded(name, weights.read(key), "Q4_K"))


@pytest.mark.parametrize("hidden", [64, 256])  # with and without fall-backs
def test_a_gguf_presets_types_are_known_without_quantising(tiny: builders.Tiny, tmp_path: Path, hidden: int) -> None:
    merged, full, made = tiny("llava15", "llama", hidden=hidden), tmp_path / "full.gguf", tmp_path / "made.gguf"
    write_text(merged, full, "f32")
    for type_ in ("Q4_K_M", "Q3_K_L", "IQ4_XS", "Q8_0"):
        run_quantizer(full, made, Wanted(type_), 1)
        plan = Gguf().preset(open_source(merged), type_, "q8_0")
        tensors = GGUFReader(made).tensors
        assert plan.parts["model"] == {t.name: t.tensor_type.name for t in tensors if len(t.shape) == 2}
        assert plan.parts["mmproj"] == {"*": "Q8_0"}


def test_an_mlx_presets_types_are_known_without_quantising(tiny: builders.Tiny, tmp_path: Path) -> None:
    merged = tiny("llava15", "llama", hidden=256)
    plan = Mlx().preset(open_source(merged), "mixed_4_6", 32)
    out = mlx.quantize(merged, tmp_path / "edge", "mixed_4_6", 32)
    held = artifact.read(out).metrics["quantized"]["types"]
    assert {type_: list(plan.parts["model"].values()).count(type_) for type_ in held if type_ != "f16"} == {
        type_: count for type_, count in held.items() if type_ != "f16"
    }
    with pytest.raises(ConfigError, match=r"--type mxfp4: plans have no mxfp4: take q4"):
        Mlx().preset(open_source(merged), "mxfp4")


def test_a_killed_run_goes_on(uneven: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    to, out = Mlx(Calibration(data, rescale=True, limit=8)), tmp_path / "edge"
    plan = to.preset(open_source(uneven), "q4")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(mlx, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            quantize_planned(uneven, out, plan, to)
    kept = (tmp_path / ".edge.partial" / SCALES).read_bytes()
    monkeypatch.setattr(calibration, "search", killed)

    done = quantize_planned(uneven, out, plan, to)

    assert (done / SCALES).read_bytes() == kept
    assert not list(done.rglob("*.npy")) and artifact.verify(done, "mlx")


def test_scales_of_another_model_are_refused(tiny: builders.Tiny, tmp_path: Path) -> None:
    source, path = open_source(tiny("llava15", "llama")), tmp_path / SCALES
    norm = f"{LAYER}.input_layernorm.weight"
    big = io.BytesIO()
    with zipfile.ZipFile(big, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb.npy", bytes(300 << 20))
    pickled = io.BytesIO()
    np.savez(pickled, **{norm: np.array([{}], object)})
    for content in (b"", b"PK\x03\x04", b"{}", big.getvalue(), pickled.getvalue()):
        path.write_bytes(content)
        with pytest.raises(ArtifactError, match="no scales of a rescaled model") as caught:
            read_scales(source, path)
        assert "\n" not in str(caught.value)
    for scales, reason in (
        ({"language_model.layers.7.mlp.up_proj.weight": np.ones(64, np.float32)}, "is no scale of this model"),
        ({norm: np.ones(63, np.float32)}, "is no scale of this model"),
        ({norm: np.full(64, np.nan, np.float32)}, "nothing can be divided by"),
        ({norm: np.zeros(64, np.float32)}, "nothing can be divided by"),
    ):
        write_scales(scales, path)
        with pytest.raises(ArtifactError, match=reason):
            read_scales(source, path)
    write_scales({}, path)
    assert read_scales(source, path) == {}


def test_on_the_command_line(uneven: Path, data: Path) -> None:
    folder = uneven.parent
    words = ["quantize", str(uneven), "--q4", "--to", "mlx", "--rescale", "--feedback", "--data", str(data)]
    done = CliRunner().invoke(cli, words, catch_exceptions=False)
    assert done.stdout.strip() == str(folder / "model-mlx-q4-rescale-feedback")
    manifest = artifact.verify(Path(done.stdout.strip()), "mlx")
    assert (manifest.config["rescale"], manifest.config["feedback"]) == ("96", "96")
    assert set(manifest.metrics["quantized"]["types"]) == {"affine-4-g64", "f16"}


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--q4", "--rescale"], "--fit, --rescale and --feedback want --data"),
        (["--q4", "--feedback"], "--fit, --rescale and --feedback want --data"),
        (["--plan", "p", "--rescale"], "--fit, --rescale and --feedback want --data"),
        (["--q4", "--fit"], "--fit, --rescale and --feedback want --data"),
        (["--q4", "--fit", "--rescale", "--data", "d"], "--fit tries --rescale and --feedback itself"),
        (["--max-loss", "1", "--feedback"], "--fit, --rescale and --feedback want --data"),
        (["--q4", "--data", "d"], "--data goes with --max-loss, --fit, --rescale or --feedback"),
        (["--to", "mlx", "--q4", "--rescale", "--data", "d", "--mmproj", "f16"], "--to mlx"),
    ],
)
def test_options_that_do_not_go_together(words: list[str], reason: str) -> None:
    done = CliRunner().invoke(cli, ["quantize", "merged", *words])
    assert isinstance(done.exception, ConfigError) and reason in str(done.exception)
