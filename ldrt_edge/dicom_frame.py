"""Decode one compressed DICOM frame in a process of its own.

GDCM, the only decoder of JPEG Lossless and JPEG-LS among our dependencies, ends the whole process on some damaged
streams (`terminate called after throwing gdcm::Exception`): a conversation or a server must outlive that.

    python -P -m ldrt_edge.dicom_frame 0 < film.dcm > frame.npy
"""

from __future__ import annotations

import io
import subprocess
import sys

import numpy as np
from numpy.typing import NDArray

_TIMEOUT_S = 120


def decode_apart(data: bytes, frame: int) -> NDArray[np.integer]:
    """Decode frame `frame` of the DICOM file `data` by GDCM: (rows, columns) or (rows, columns, 3), as stored.

    Raises:
        ValueError: GDCM cannot decode it, or died of it.
    """
    command = [sys.executable, "-P", "-m", "ldrt_edge.dicom_frame", str(frame)]
    try:
        child = subprocess.run(command, input=data, capture_output=True, timeout=_TIMEOUT_S, check=True)
        return np.asarray(np.load(io.BytesIO(child.stdout), allow_pickle=False))
    except (subprocess.SubprocessError, ValueError, EOFError):
        raise ValueError("GDCM cannot decode it") from None  # the cause quotes the child's output

def main() -> None:
    """Read a DICOM file from stdin and write the frame named by the first argument to stdout, as .npy."""
    from pydicom import dcmread
    from pydicom.pixels.utils import pixel_array

    header = dcmread(io.BytesIO(sys.stdin.buffer.read()), force=True)
    np.save(sys.stdout.buffer, pixel_array(header, index=int(sys.argv[1]), decoding_plugin="gdcm"))

if __name__ == "__main__":
    main()
