"""Where a user's trusted keys and unpacked bundles lie: the system's usual folder, or `LDRT_EDGE_HOME`."""

from __future__ import annotations

import os
from pathlib import Path

import click


def home() -> Path:
    """The folder; it may not exist yet."""
    return Path(os.environ.get("LDRT_EDGE_HOME") or click.get_app_dir("ldrt-edge"))


def trust_folder() -> Path:
    """Where trusted keys (NAME.pub) and authorities (NAME.crt) lie; what is removed there is no longer trusted."""
    return home() / "trusted"
