"""A report's answers in the form of lmms-eval's logs, for tools that read those.

    report/  →  OUT/MODEL/DATE_results.json, DATE_samples_TASK.jsonl

Our model runs are not lmms-eval's: only the form of the log is. `exact_match` is our grading, with its rules as the
task's version; a standard error is the one of clustered questions, from the 95% interval.

Source: `EvaluationTracker.save_results_samples` and `evaluator.py` of lmms-eval 0.7.3.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

from ldrt_edge.artifact import Json
from ldrt_edge.bench.opened import Opened, open_report
from ldrt_edge.bench.vqa import Sample
from ldrt_edge.errors import ArtifactError

_NORMAL = 1.96  # half a 95% interval in standard errors


def export(report: Path, out: Path) -> Path:
    """Write the logs of a report's subject; returns the folder with the two files.

    Raises:
        ArtifactError: `report` is no report of `bench`, or the files are there already.
    """
    opened = open_report(report)
    task = _plain(f"ldrt_edge_{opened.dataset[0]}_{opened.split}")
    date = re.sub(r"[-:Z]", "", opened.data["environment"]["created"]).replace("T", "_")
    folder = out / _plain(opened.data["subject"]["name"])
    samples, results = folder / f"{date}_samples_{task}.jsonl", folder / f"{date}_results.json"
    there = [path.name for path in (samples, results) if path.exists()]
    if there:
        raise ArtifactError(f"{folder}: {', '.join(there)} is there already: choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    with samples.open("w", encoding="utf-8") as stream:
        for number, sample in enumerate(opened.samples.values()):
            stream.write(json.dumps(_logged(number, sample), ensure_ascii=False) + "\n")
    results.write_text(json.dumps(_results(opened, task), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return folder


def _logged(number: int, sample: Sample) -> Json:
    """One line; `resps` is left out, as lmms-eval does where nothing was filtered."""
    doc = {"id": sample.id, "question": sample.question, "answer": sample.answer, "image": sample.image_sha256}
    return {
        "doc_id": number,
        "target": sample.answer,
        "filtered_resps": sample.subject.text,
        "token_counts": [None],
        "doc_hash": hashlib.sha256(json.dumps(doc, indent=2, ensure_ascii=False).encode()).hexdigest(),
        "exact_match": float(sample.subject.correct),
        "token_f1": sample.subject.token_f1,
        "input": sample.question,
        "ldrt_edge": doc | {"task": sample.task, "language": sample.language, "answer_type": sample.answer_type},
    }


def _results(opened: Opened, task: str) -> Json:
    overall, questions = opened.data["vqa"]["overall"]["accuracy"], len(opened.samples)
    error = (overall["ci_high"] - overall["ci_low"]) / 2 / _NORMAL
    return {
        "results": {
            task: {"alias": task, "exact_match,none": overall["value"], "exact_match_stderr,none": error}
        },
        "configs": {task: {"task": task, "output_type": "generate_until", "metadata": {
            "dataset_manifest_sha256": opened.dataset[1], "report_manifest_sha256": opened.manifest_sha256,
        }}},
        "versions": {task: opened.rules},
        "n-shot": {task: 0},
        "higher_is_better": {task: {"exact_match": True}},
        "n-samples": {task: {"original": questions, "effective": questions}},
        "model_name": opened.data["subject"]["name"],
        "git_hash": opened.data["environment"]["git_commit"],
        "date": opened.data["environment"]["created"],
    }  # fmt: skip


def _plain(name: str) -> str:
    return re.sub(r"[^\w.-]+", "_", name)
