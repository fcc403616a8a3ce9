"""The story of the product, runnable: from a base model to an answer, on the embedded defaults.

Nothing but calls to the stages. Each finds its finished artefact again, so a demo that was stopped goes on.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from ldrt_edge import artifact, console
from ldrt_edge.dataset import Dataset

IMAGES = 800
QUESTIONS = 200
LANGUAGES: tuple[Literal["en"], ...] = ("en",)
"""The starter's language model knows English only; `ldrt-edge data phantom` draws questions in six languages."""


def demo(folder: Path, images: int = IMAGES, questions: int = QUESTIONS, settings: Sequence[str] = ()) -> Path:
    """Run the line in `folder`; returns the report's folder.

    `images` are drawn, about `questions` of their questions asked, `settings` override the recipe (key=value).
    """
    from ldrt_edge.bench.report import bench
    from ldrt_edge.chat.terminal import ask_once
    from ldrt_edge.convert.gguf import convert
    from ldrt_edge.convert.quantize import quantize
    from ldrt_edge.runtimes.base import Sampling
    from ldrt_edge.train.base import resolve_base
    from ldrt_edge.train.data.phantom import phantom
    from ldrt_edge.train.lora import train
    from ldrt_edge.train.merge import merge
    from ldrt_edge.train.recipe import load_recipe
    from ldrt_edge.train.starter import assemble

    console.say("1/8  A base: the starter, a real LLaVA of 162 M parameters")
    base = resolve_base(str(assemble(folder / "starter")))

    console.say("2/8  Data: phantom treatment plans with exactly known answers")
    data = phantom(folder / "phantom", images, seed=0, languages=LANGUAGES)

    console.say("3/8  Training: projector, and LoRA on the language model")
    adapter = train(base, [data], folder / "adapter", load_recipe("starter", settings))

    console.say("4/8  Merging, and the proof that nothing got lost")
    merged = merge(base, adapter, folder / "merged")

    console.say("5/8  Converting to GGUF, held against the merged model")
    convert(merged, folder / "gguf-f16", "f16")

    console.say("6/8  Quantising to 4 bits")
    edge = quantize(merged, folder / "gguf-q4", "Q4_K_M")

    console.say("7/8  Measuring what that cost")
    report = bench(edge, data, folder / "report", reference=merged, limit=questions)

    console.say("8/8  An answer about a picture it has not seen")
    test = Dataset(data)
    row = next(row for row in test.rows("test") if row.task == "beam count")
    picture = test.image_path(row)
    answer = ask_once(edge, row.question, picture, sampling=Sampling(max_tokens=32), burned_in="show")
    console.say(f"     {picture}\n     Q: {row.question}\n     A: {answer.answer}   (right: {row.answer})")
    _summary(report)
    return report


def _summary(report: Path) -> None:
    metrics = artifact.read(report).metrics
    console.say(
        f"     right {metrics['accuracy']:.1%}, with a wrong picture {metrics['blind']:.1%}; "
        f"4 bits lost {100 * metrics['loss']:+.1f} points, KLD {metrics['mean_kld']:.4f}"
    )
    console.say(f"     Read {report / 'report.html'}; ask more with: ldrt-edge chat {report.parent / 'gguf-q4'}")
