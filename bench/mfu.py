"""Model FLOPs utilisation of training on a GPU: what the model asks for, over what the GPU can multiply.

The ceiling is not a data sheet's but a large matrix product's on the same GPU, minutes before. A frozen weight costs a
token four operations: a multiplication and an addition, forward and back to the inputs; LoRA, attention and the vision
tower are left out, so the figure errs on the low side.

Source: Chowdhery et al., "PaLM", appendix B (MFU; six operations there, where weights have gradients too).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ldrt_edge.errors import require

_OPERATIONS = 4
_SIDE, _TIMES = 8192, 10


@dataclass(frozen=True)
class Ceiling:
    """A GPU's name, and the operations a second of a large bf16 matrix product on it."""

    device: str
    flops: float

    def utilisation(self, weights: int, tokens_per_s: float) -> float:
        """Of training with so many frozen weights, each met by every token."""
        return _OPERATIONS * weights * tokens_per_s / self.flops


def measure_ceiling() -> Ceiling | None:
    """Of the GPU at hand; None where there is none."""
    torch = require("torch", "train")
    if not torch.cuda.is_available():
        return None
    left, right = (torch.randn(_SIDE, _SIDE, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    for _ in range(3):
        left @ right
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(_TIMES):
        left @ right
    end.record()
    torch.cuda.synchronize()
    seconds = start.elapsed_time(end) / 1e3
    name = torch.cuda.get_device_name()
    del left, right
    torch.cuda.empty_cache()
    return Ceiling(name, _TIMES * 2 * _SIDE**3 / seconds)


def decoder_weights(folder: Path) -> int:
    """Of a base's language model: weights of its decoder's linears."""
    from transformers import AutoConfig

    from ldrt_edge.train.plan import count
    from ldrt_edge.train.recipe import Recipe

    return count(AutoConfig.from_pretrained(folder, local_files_only=True), Recipe())[1]
