"""Prints the path of a file in this folder, for `accelerate launch --config_file $(...)`, `sbatch`, `kubectl`."""

from __future__ import annotations

import sys
from importlib import resources


def main() -> int:
    """Print the file's path; without a name, or with an unknown one, list all."""
    folder = resources.files("ldrt_edge.train.launch")
    kinds = (".yaml", ".sbatch")
    files = {entry.name.partition(".")[0]: entry for entry in folder.iterdir() if entry.name.endswith(kinds)}
    chosen = files.get(sys.argv[1]) if len(sys.argv) == 2 else None
    if chosen is None:
        print(f"usage: python -m ldrt_edge.train.launch {'|'.join(sorted(files))}", file=sys.stderr)
        return 2
    print(chosen)
    return 0


if __name__ == "__main__":
    sys.exit(main())
