"""llama.cpp's quantiser in a process of its own, so that its aborts, a full disk and Ctrl-C end it and nothing else.

    python -m ldrt_edge.convert.quantize_worker < JOB.json

llama.cpp's log goes to standard output as it comes, the reason of a refusal to standard error.
"""

from __future__ import annotations

import ctypes
import json
import re
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gguf import GGMLQuantizationType

from ldrt_edge.convert.importance import read_imatrix
from ldrt_edge.errors import ArtifactError
from ldrt_edge.runtimes.llamacpp_bindings import library

_BUFFER_BYTES = 128 << 20  # of rows in memory at once; llama.cpp's own default is 8 GiB


@dataclass(frozen=True)
class Job:
    """One file to quantise. file_type: llama.cpp's number; imatrix: an importance matrix; types: by tensor name.

    dry_run: only tell which types its tensors would get.
    """

    source: str
    target: str
    file_type: int
    threads: int
    imatrix: str | None = None
    types: Mapping[str, str] = field(default_factory=dict)
    dry_run: bool = False


def main(job: Job) -> int:
    """Quantise one GGUF file; returns the exit status."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a C call would hold Python's own handler back
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # end when the parent is gone
    loaded = library()
    loaded.log.listener = _print
    wanted = loaded.llama.llama_model_quantize_default_params()
    wanted.ftype, wanted.nthread, wanted.max_buf_size = job.file_type, job.threads, _BUFFER_BYTES
    wanted.dry_run = job.dry_run
    try:
        if job.imatrix is not None:
            wanted.imatrix = _imatrix(loaded.llama, Path(job.imatrix))
    except ArtifactError as error:
        print(error, file=sys.stderr)
        return 1
    if job.types:
        wanted.tt_overrides = _overrides(loaded.llama, job.types)
    failed = loaded.llama.llama_model_quantize(job.source.encode(), job.target.encode(), ctypes.byref(wanted))
    if failed:
        print(loaded.log.last_error(), file=sys.stderr)
    return int(bool(failed))


def _imatrix(llama: Any, path: Path) -> Any:
    """The array that ends with an entry of no name, as tools/quantize/quantize.cpp fills it."""
    means = read_imatrix(path)
    entries = (llama.llama_model_imatrix_data * (len(means) + 1))()
    for entry, (name, values) in zip(entries, means.items(), strict=False):
        data = (ctypes.c_float * values.size).from_buffer_copy(values.tobytes())
        entry.name, entry.data, entry.size = name.encode(), ctypes.cast(data, type(entry.data)), values.size
    return entries


def _overrides(llama: Any, types: Mapping[str, str]) -> Any:
    """The array that ends with an entry of no pattern; llama.cpp takes names as regular expressions."""
    entries = (llama.llama_model_tensor_override * (len(types) + 1))()
    for entry, (name, type_) in zip(entries, types.items(), strict=False):
        entry.pattern, entry.type = f"^{re.escape(name)}$".encode(), GGMLQuantizationType[type_].value
    return entries


def _print(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(Job(**json.load(sys.stdin))))
