"""llama.cpp's quantiser in a process of its own, so that its aborts, a full disk and Ctrl-C end it and nothing else.

    python -m ldrt_edge.convert.quantize_worker SOURCE TARGET FILE_TYPE THREADS

llama.cpp's log goes to standard output as it comes, the reason of a refusal to standard error.
"""

from __future__ import annotations

import ctypes
import signal
import sys

from ldrt_edge.runtimes.llamacpp_bindings import library

_BUFFER_BYTES = 256 << 20  # of rows in memory at once; llama.cpp's own default is 8 GiB


def main(source: str, target: str, file_type: str, threads: str) -> int:
    """Quantise one GGUF file; returns the exit status."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a C call would hold Python's own handler back
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # end when the parent is gone
    loaded = library()
    loaded.log.listener = _print
    wanted = loaded.llama.llama_model_quantize_default_params()
    wanted.ftype, wanted.nthread, wanted.max_buf_size = int(file_type), int(threads), _BUFFER_BYTES
    failed = loaded.llama.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(wanted))
    if failed:
        print(loaded.log.last_error(), file=sys.stderr)
    return int(bool(failed))


def _print(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
