"""Adapters that mlx-vlm and PEFT saved: merged, they are the model that their own trainer had."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny as builders
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from ldrt_edge import artifact
from ldrt_edge.cli import cli
from ldrt_edge.convert.mlx import convert
from ldrt_edge.errors import ArtifactError
from ldrt_edge.train.base import resolve_base
from ldrt_edge.train.foreign import CONFIG, MLX_WEIGHTS, WEIGHTS
from ldrt_edge.train.merge import merge

IDS = [5, 6, 7, 8, 9]
QUERY = "base_model.model.model.language_model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def base(tiny: builders.Tiny) -> Path:
    return tiny("llava15", "smollm2")


def logits(folder: Path, adapter: Path | None = None) -> Any:
    """Of a text, by transformers and PEFT alone."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    if adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter)
    with torch.inference_mode():
        return model(input_ids=torch.tensor([IDS])).logits[0].numpy()


@pytest.fixture(scope="module")
def by_peft(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter as PEFT saves it, its projector trained whole."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(
        r=4, lora_alpha=6, use_rslora=True, target_modules=r".*language_model.*\.(q_proj|down_proj)",
        modules_to_save=["multi_modal_projector"],
    )  # fmt: skip
    model = get_peft_model(AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            parameter.data.normal_(0, 0.1)
    folder = tmp_path_factory.mktemp("peft") / "adapter"
    model.save_pretrained(folder)
    return folder


def test_mlx_vlms_adapter_is_merged_as_mlx_vlm_has_it(base: Path, tmp_path: Path) -> None:
    mx, trainer = pytest.importorskip("mlx.core"), pytest.importorskip("mlx_vlm.trainer.peft.utils")
    from mlx.utils import tree_flatten, tree_map
    from mlx_vlm.utils import load_model

    model = trainer.get_peft_model(load_model(convert(base, tmp_path / "mlx", "f32")), rank=4, alpha=6, dropout=0.0)
    trainer.unfreeze_modules(model, ["multi_modal_projector"])
    mx.random.seed(0)
    model.update(tree_map(lambda values: mx.random.normal(values.shape) * 0.2, model.trainable_parameters()))
    (tmp_path / "adapter").mkdir()
    trainer.save_adapter(model, tmp_path / "adapter" / MLX_WEIGHTS)

    given = CliRunner().invoke(cli, [
        "merge", "--base", str(base), "--adapter", str(tmp_path / "adapter"), "--out", str(tmp_path / "merged")
    ])  # fmt: skip

    assert given.exit_code == 0, given.output
    expected = np.array(model.language_model(mx.array([IDS])).logits[0])
    np.testing.assert_allclose(logits(tmp_path / "merged"), expected, atol=1e-3 * np.abs(expected).max())
    assert np.abs(logits(base) - expected).max() > 0.1 * np.abs(expected).max()
    projector = dict(tree_flatten(model.multi_modal_projector.parameters()))
    weights = load_file(tmp_path / "merged" / "model.safetensors")
    [kept] = [values for name, values in weights.items() if name.endswith("multi_modal_projector.linear_1.weight")]
    np.testing.assert_allclose(kept.float().numpy(), np.array(projector["linear_1.weight"]), atol=1e-6)
    adopted = artifact.verify(tmp_path / "adapter-adopted", "adapter")
    assert set(adopted.config["from"]) == {CONFIG, MLX_WEIGHTS}
    assert artifact.read(tmp_path / "merged").inputs[1].manifest_sha256 == adopted.sha256


def test_pefts_adapter_is_merged_as_peft_has_it(base: Path, by_peft: Path, tmp_path: Path) -> None:
    shutil.copytree(by_peft, tmp_path / "adapter")
    merged = merge(resolve_base(str(base)), tmp_path / "adapter", tmp_path / "merged")

    expected = logits(base, by_peft)
    np.testing.assert_allclose(logits(merged), expected, atol=1e-3 * np.abs(expected).max())
    assert np.abs(logits(base) - expected).max() > 0.1 * np.abs(expected).max()
    again = merge(resolve_base(str(base)), tmp_path / "adapter", tmp_path / "again")
    assert artifact.read(again).inputs == artifact.read(merged).inputs, "what was adopted is found again"


@pytest.mark.parametrize("first", ["pissa", "olora"])
def test_an_adapter_that_changed_the_base_is_merged_once_peft_made_plain_lora_of_it(
    base: Path, tmp_path: Path, first: Any
) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, lora_alpha=8, target_modules=r".*language_model.*q_proj", init_lora_weights=first)
    model = get_peft_model(AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32), config)
    config.init_lora_weights = True  # as PEFT wants the first weights to be saved
    model.save_pretrained(tmp_path / "first")
    config.init_lora_weights = first
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += torch.randn_like(parameter) * 0.1
    with torch.inference_mode():
        expected = model(input_ids=torch.tensor([IDS])).logits[0].numpy()
    model.save_pretrained(tmp_path / "as trained")
    with pytest.raises(ArtifactError, match=f"init_lora_weights='{first}' changed the base"):
        merge(resolve_base(str(base)), tmp_path / "as trained", tmp_path / "merged")
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "first"))
    merge(resolve_base(str(base)), tmp_path / "plain", tmp_path / "merged")
    assert np.abs(logits(tmp_path / "merged") - expected).max() < 1e-3 * np.abs(expected).max()


def test_pefts_adapter_whose_projector_alone_was_trained_is_merged(base: Path, by_peft: Path, tmp_path: Path) -> None:
    shutil.copytree(by_peft, tmp_path / "adapter")
    state = {name: tensor * ("lora_B" not in name) for name, tensor in load_file(by_peft / WEIGHTS).items()}
    save_file(state, tmp_path / "adapter" / WEIGHTS)
    merged = load_file(merge(resolve_base(str(base)), tmp_path / "adapter", tmp_path / "merged") / "model.safetensors")
    trained = {name.partition("projector")[2]: tensor for name, tensor in state.items() if "projector" in name}
    for name, before in load_file(base / "model.safetensors").items():
        torch.testing.assert_close(merged[name], trained.get(name.partition("projector")[2], before))
        assert torch.equal(merged[name], before) != ("projector" in name), name


@pytest.mark.parametrize(("spoil", "reason"), [
    ({"use_dora": True}, "use_dora: not merged"),
    ({"use_qalora": True, "bias": "all", "made_tomorrow": 3}, "bias, use_qalora, made_tomorrow: not merged"),
    ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens: not merged"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' changed the base"),
    ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4' changed the base"),
    ({"init_lora_weights": "olora"}, "init_lora_weights='olora' changed the base"),
    ({"init_lora_weights": ["loftq"]}, r"init_lora_weights=\['loftq'\] changed the base"),
    ({"peft_type": "IA3"}, "kind 'IA3'"),
    ({"r": None}, "no rank and scale"),
    ({"r": 0}, "no rank and scale"),
    ({"r": 8}, "on this base"),
])  # fmt: skip
def test_what_is_not_merged_is_refused(
    base: Path, by_peft: Path, tmp_path: Path, spoil: dict[str, Any], reason: str
) -> None:
    shutil.copytree(by_peft, tmp_path / "adapter")
    config = json.loads((by_peft / CONFIG).read_text())
    (tmp_path / "adapter" / CONFIG).write_text(json.dumps(config | spoil))
    with pytest.raises(ArtifactError, match=reason):
        merge(resolve_base(str(base)), tmp_path / "adapter", tmp_path / "merged")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize(("edit", "reason"), [
    (lambda state: state.pop(f"{QUERY}.lora_B.weight"), "wants lora_A and lora_B"),
    (lambda state: state[f"{QUERY}.lora_A.weight"].fill_(float("nan")), "no number"),
    (lambda state: state.update({"base_model.model.lm_head.weight": torch.zeros(4, 4)}), "whole projector are merged"),
    (lambda state: state.clear(), "no LoRA"),
    (lambda state: [state.pop(name) for name in list(state) if "lora" in name], "no LoRA"),
])  # fmt: skip
def test_weights_that_do_not_fit_are_refused(
    base: Path, by_peft: Path, tmp_path: Path, edit: Any, reason: str
) -> None:
    shutil.copytree(by_peft, tmp_path / "adapter")
    state = load_file(by_peft / WEIGHTS)
    edit(state)
    save_file(state, tmp_path / "adapter" / WEIGHTS)
    with pytest.raises(ArtifactError, match=reason):
        merge(resolve_base(str(base)), tmp_path / "adapter", tmp_path / "merged")


def test_folders_that_are_no_adapter_are_refused(base: Path, by_peft: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(by_peft, tmp_path / "adapter")
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])
    with pytest.raises(ArtifactError, match=r"corrupt|truncated"):
        merge(resolve_base(str(base)), folder, tmp_path / "merged")
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(ArtifactError, match="wants one of"):
        merge(resolve_base(str(base)), folder, tmp_path / "merged")
    (folder / MLX_WEIGHTS).write_bytes(b"")
    (folder / CONFIG).write_text('{"fine_tune_type": "full"}')
    with pytest.raises(ArtifactError, match="truncated"):
        merge(resolve_base(str(base)), folder, tmp_path / "merged")
