"""`ldrt-edge convert EDGE --for ollama|lmstudio`: the files of an export as another app imports them.

Weights are linked, not copied, where the disk allows it. Such an app answers with its own llama.cpp and prepares
pictures its own way: what is known to go wrong there is said in one line.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from ldrt_edge import artifact, console
from ldrt_edge.convert.gguf import LICENCES, check_choice
from ldrt_edge.errors import ArtifactError, ConfigError
from ldrt_edge.front import Front, Message
from ldrt_edge.runtimes.llamacpp import LlamaCppRuntime, gguf_pair

App = Literal["ollama", "lmstudio"]
_PUBLISHER = "ldrt-edge"
_CONTEXT = 4096
_USER, _ANSWER, _AGAIN = "\ue001", "\ue002", "\ue003"  # private-use sentinels: no template contains them


def for_app(edge: Path, app: str, out: Path) -> Path:
    """Write what `app` imports; returns `out`, an artefact of kind "app".

    ollama takes a gguf artefact (`ollama create NAME -f OUT/Modelfile`); lmstudio a gguf or an mlx artefact (copy what
    lies in `OUT` into its models folder).

    Raises:
        ConfigError: an unknown app, or one that does not read this kind of export.
        ArtifactError: `edge` is damaged or no export, or its chat template cannot be said in ollama's language.
    """
    target: App = check_choice("--for", app, get_args(App))
    kind = artifact.verify(edge, "gguf", "mlx").kind
    if target == "ollama" and kind == "mlx":
        raise ConfigError(f"{edge}: ollama reads GGUF: convert or quantise with --to gguf")
    name = edge.name
    wrong = _known_faults(edge, kind)
    with artifact.create(out, "app", {"app": target}, [edge]) as draft:
        if not draft.complete:
            if (edge / LICENCES).is_dir():
                shutil.copytree(edge / LICENCES, draft.path / LICENCES)
            if target == "ollama":
                model, mmproj = (_link(path, draft.path / path.name) for path in gguf_pair(edge))
                text = modelfile(Front.load(edge), model.name, mmproj.name, _adds_start(model))
                (draft.path / "Modelfile").write_text(text, encoding="utf-8")
            else:
                _lay_out(edge, kind, draft.path / _PUBLISHER / name)
    if wrong:
        console.say(
            f"note: {app}, on a llama.cpp like the one installed here, does not answer as ldrt-edge does: "
            f"{'; '.join(wrong)} (ldrt-edge parity --peers shows by how much)"
        )
    return out


def modelfile(front: Front, model: str, mmproj: str, adds_start: bool) -> str:
    """Ollama's description of a model: files, chat template, stop tokens. Source: ollama, docs/modelfile.md.

    adds_start: whether the GGUF has its reader put the start token before the text.

    Raises:
        ArtifactError: the chat template cannot be said in ollama's language.
    """
    first, generation, answer, between = _parts(front)
    if adds_start:
        first = first.removeprefix(front.config.special_tokens.get("bos_token", ""))
    template = (
        '{{- range $i, $message := .Messages }}{{ if eq .Role "user" }}'
        f"{{{{ if $i }}}}{between}{{{{ else }}}}{first}{{{{ end }}}}{{{{ .Content }}}}{generation}"
        f'{{{{ else if eq .Role "assistant" }}}}{answer}{{{{ .Content }}}}{{{{ end }}}}{{{{ end }}}}'
    )
    stops = [stop for token in front.config.stop_ids if (stop := front.tokenizer.id_to_token(token))]
    context = min(front.config.context_length, _CONTEXT)
    lines = [f"FROM ./{model}", f"FROM ./{mmproj}", f'TEMPLATE """{template}"""']
    lines += [f'PARAMETER stop "{stop}"' for stop in stops]
    return "\n".join([*lines, f"PARAMETER num_ctx {context}", "PARAMETER temperature 0", ""])


def _parts(front: Front) -> tuple[str, str, str, str]:
    """What a template writes before the first question, behind a question, before an answer, and between turns."""
    asked = front.render([Message("user", _USER)])
    again = front.render([Message("user", _USER), Message("assistant", _ANSWER), Message("user", _AGAIN)])
    first, _, generation = asked.partition(_USER)
    before_answer = again.partition(_USER)[2].partition(_ANSWER)[0]
    between, _, after = again.partition(_ANSWER)[2].partition(_AGAIN)
    if not before_answer.startswith(generation) or after != generation or "{{" in asked or '"""' in again:
        raise ArtifactError("the model's chat template cannot be said in ollama's language")
    return first, generation, before_answer.removeprefix(generation), between


def _adds_start(model: Path) -> bool:
    from gguf import GGUFReader

    field = GGUFReader(model).fields.get("tokenizer.ggml.add_bos_token")
    return field is not None and bool(field.contents())


def _lay_out(edge: Path, kind: str, folder: Path) -> None:
    """PUBLISHER/NAME/files, the mmproj so named that LM Studio finds it."""
    folder.mkdir(parents=True)
    if kind == "gguf":
        model, mmproj = gguf_pair(edge)
        _link(model, folder / f"{edge.name}-{model.name.removeprefix('model-')}")
        _link(mmproj, folder / f"mmproj-{edge.name}-{mmproj.name.removeprefix('mmproj-')}")
        return
    for path in sorted(edge.iterdir()):
        if path.is_file() and path.name not in (artifact.MANIFEST, "front.json"):
            _link(path, folder / path.name)


def _link(source: Path, target: Path) -> Path:
    try:
        os.link(source, target)
    except OSError:  # another disk, or one without links
        shutil.copyfile(source, target)
    return target


def _known_faults(edge: Path, kind: str) -> list[str]:
    """What other programs are known to get wrong with this export, where that can be seen here."""
    front, wrong = Front.load(edge), []
    if kind == "gguf":
        runtime = LlamaCppRuntime(edge)
        runtime.encode(front.image(np.zeros((8, 8, 3), np.uint8)))
        if runtime.class_tokens_moved:
            wrong.append("LLaVA's class token stands behind the patches (upstream #25814)")
        runtime.close()
    if front.config.fit == "tiles":
        wrong.append("LLaVA-NeXT's tiles are not packed as the model learned them")
    if front.config.vision_tokens is not None:
        wrong.append(f"image tokens are not pooled to {front.config.vision_tokens}")
    return wrong
