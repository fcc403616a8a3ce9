"""The two papers that a bundle carries besides its report: a model card for people, a bill of materials for tools.

Both are written from what is in the artefacts and say "not stated" where these say nothing. Neither has a date or a
random number: the same model and report give the same bytes.

Sources: https://huggingface.co/docs/hub/model-cards (metadata, model-index);
https://cyclonedx.org/docs/1.6/json/ (modelCard, quantitativeAnalysis).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from ldrt_edge import __version__
from ldrt_edge.artifact import FileEntry, Manifest
from ldrt_edge.bundle.evidence import Evidence, Origin
from ldrt_edge.bundle.statement import Metric

CARD, SBOM = "README.md", "sbom.cdx.json"
_UNSTATED = "not stated"
_USE = "Research on assistants for low-dose radiation therapy, offline, on pictures such as it was measured on."
_USERS = "Medical physicists and physicians who check each answer against the picture."
_LIMITS = (
    "Not a medical device. Not for diagnosis, and not for decisions about a patient's treatment.",
    "An answer may be wrong and sound certain. The report shows how often it was, and on what.",
    "Nothing is known about pictures, languages and questions unlike those of the report.",
)


@dataclass(frozen=True)
class Described:
    """What both papers describe. base, licence: of the model, as whoever packs it states them."""

    name: str
    manifest: Manifest
    evidence: Evidence
    base: str | None
    licence: str | None

    @property
    def weights(self) -> tuple[FileEntry, ...]:
        """The model's large files."""
        return tuple(e for e in self.manifest.files if e.path.endswith((".gguf", ".safetensors")))


def card(model: Described) -> str:
    """The model card, in the form of the Hugging Face hub."""
    found = model.evidence
    lines = [
        f"# {model.name}",
        f"**{found.verdict.capitalize()}**",
        f"A vision assistant in the form that a laptop runs, packed with what was measured of it. {_USE}",
        "## Measured",
        f"{found.questions} questions about {found.images} pictures of `{found.dataset.name}` "
        f"({', '.join(found.sources) or _UNSTATED}), on {found.processor or _UNSTATED}. The whole report: "
        "`report/report.html`.",
        "\n".join(["| | measured | 95% interval |", "|---|---|---|", *map(_row, found.metrics)]),
        "## Limits",
        "\n".join(f"- {limit}" for limit in _LIMITS),
        "## Made from",
        "\n".join([
            f"- base: {model.base or _UNSTATED}",
            f"- reference: {_told(found.reference)}",
            f"- measured on: {_told(found.dataset)}; licences: {', '.join(found.licences) or _UNSTATED}",
            f"- licence of the model: {model.licence or _UNSTATED}",
            f"- settings: `{json.dumps(model.manifest.config, sort_keys=True)}`",
            f"- by ldrt-edge {model.manifest.version}, commit {model.manifest.git_commit or _UNSTATED}",
        ]),
    ]  # fmt: skip
    head = yaml.safe_dump(_metadata(model), sort_keys=False, allow_unicode=True)
    return f"---\n{head}---\n" + "\n\n".join(lines) + "\n"


def sbom(model: Described) -> str:
    """The bill of materials: CycloneDX 1.6 JSON with model card, measured metrics, data, libraries and weights."""
    found, manifest = model.evidence, model.manifest
    component = {
        "type": "machine-learning-model",
        "bom-ref": "model",
        "name": model.name,
        "version": manifest.sha256,
        "description": found.verdict,
        **({"licenses": [{"license": {"name": model.licence}}]} if model.licence else {}),
        "pedigree": {"ancestors": _ancestors(model)},
        "modelCard": {
            "modelParameters": {
                "approach": {"type": "supervised"},
                "task": "visual question answering",
                "architectureFamily": "LLaVA",
                "datasets": [{"ref": "data"}],
            },
            "quantitativeAnalysis": {"performanceMetrics": [_performance(m, found.dataset) for m in found.metrics]},
            "considerations": {"users": [_USERS], "useCases": [_USE], "technicalLimitations": list(_LIMITS)},
        },
    }
    data = {
        "type": "data",
        "bom-ref": "data",
        "name": found.dataset.name,
        "version": found.dataset.sha256,
        "description": f"{found.questions} questions about {found.images} pictures, asked for the report",
        "licenses": [{"license": {"name": licence}} for licence in found.licences],
        "data": [{"type": "dataset", "name": source} for source in found.sources],
    }
    files = [
        {"type": "file", "name": entry.path, "hashes": [{"alg": "SHA-256", "content": entry.sha256}]}
        for entry in model.weights
    ]
    document = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"tools": {"components": [_tool(__version__)]}, "component": component},
        "components": [data, *files, *(_library(*item) for item in sorted(manifest.libraries.items()))],
    }
    return json.dumps(document, indent=1, ensure_ascii=False) + "\n"


def _metadata(model: Described) -> dict[str, Any]:
    found = model.evidence
    measured = [{"type": metric.name, "value": round(metric.value, 6)} for metric in found.metrics]
    results = [{
        "task": {"type": "visual-question-answering"},
        "dataset": {"name": found.dataset.name, "type": found.dataset.name},
        "metrics": measured,
    }]  # fmt: skip
    return {
        **({"license": model.licence} if model.licence else {}),
        **({"base_model": model.base} if model.base else {}),
        "pipeline_tag": "image-text-to-text",
        "library_name": model.manifest.kind,
        "tags": ["medical", "radiotherapy", "not-for-diagnosis"],
        "model-index": [{"name": model.name, "results": results}],
    }


def _row(metric: Metric) -> str:
    interval = "" if metric.ci_low is None or metric.ci_high is None else f"{metric.ci_low:.3g} to {metric.ci_high:.3g}"
    return f"| {metric.name} | {metric.value:.3g} | {interval} |"


def _told(origin: Origin | None) -> str:
    return f"`{origin.name}` (manifest {origin.sha256})" if origin else "none"


def _performance(metric: Metric, dataset: Origin) -> dict[str, Any]:
    shown: dict[str, Any] = {"type": metric.name, "value": f"{metric.value:.6g}", "slice": dataset.name}
    if metric.ci_low is not None and metric.ci_high is not None:
        shown["confidenceInterval"] = {"lowerBound": f"{metric.ci_low:.6g}", "upperBound": f"{metric.ci_high:.6g}"}
    return shown


def _ancestors(model: Described) -> list[Mapping[str, Any]]:
    reference = model.evidence.reference
    known = [{"type": "machine-learning-model", "name": model.base}] if model.base else []
    if reference:
        known.append({"type": "machine-learning-model", "name": reference.name, "version": reference.sha256})
    return list(known)


def _tool(version: str) -> dict[str, Any]:
    return {**_library("ldrt-edge", version), "licenses": [{"license": {"id": "Apache-2.0"}}]}


def _library(name: str, version: str) -> dict[str, Any]:
    return {"type": "library", "name": name, "version": version, "purl": f"pkg:pypi/{name}@{version}"}
