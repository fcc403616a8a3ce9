"""The page in the user's browser, without its token on a command line, which everybody on the machine can list.

The browser is given a file that leads to the page, readable by its owner alone, which goes when it was read. It lies in
the home folder: browsers in a sandbox (Snap's) read neither /tmp nor hidden folders.
"""

from __future__ import annotations

import os
import tempfile
import threading
import webbrowser
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_STARTED_WITHIN_S = 60.0  # a browser, at its slowest


@contextmanager
def in_browser(address: str) -> Iterator[None]:
    """Open a page while the block runs; where the file cannot be written, the user has the printed address."""
    try:
        file = _way_to(address)
    except (OSError, RuntimeError):  # RuntimeError: there is no home
        yield
        return
    timers = (
        threading.Timer(0.3, webbrowser.open, (file.as_uri(),)),  # the server is ready by then
        threading.Timer(_STARTED_WITHIN_S, file.unlink, kwargs={"missing_ok": True}),
    )
    try:
        for timer in timers:
            timer.start()
        yield
    finally:
        for timer in timers:
            timer.cancel()
        file.unlink(missing_ok=True)


def _way_to(address: str) -> Path:
    descriptor, name = tempfile.mkstemp(".html", "ldrt-edge-", Path.home())  # of mode 0600
    with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
        stream.write(f'<!doctype html><title>ldrt-edge</title><meta http-equiv="refresh" content="0; url={address}">\n')
    return Path(name)
