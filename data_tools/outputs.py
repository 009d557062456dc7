"""Writing large files: where they are opened, bytes copied from file to file inside the kernel, and the bytes of a .npy file."""

from __future__ import annotations

import errno
import io
import os
from pathlib import Path
from typing import BinaryIO

import numpy as np

_BLOCK = 1 << 20
_NOT_HERE = {errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF, errno.EPERM, errno.ETXTBSY}


def open_output(path: Path, *, resume: bool = False) -> BinaryIO:
    """Where all large files are opened for writing; ``resume`` keeps what is there.  Plain writes, not a memory map: a full disk is then an OSError and not a
    crash."""
    return open(path, "r+b" if resume else "wb")


def copy_range(source: BinaryIO, start: int, size: int, target: BinaryIO) -> None:
    """Append ``size`` bytes of ``source`` from ``start`` at the place where ``target`` stands.

    Inside the kernel where the system can (copy_file_range: file systems with shared blocks copy nothing at all), else through a buffer.
    """
    target.flush()
    place = target.tell()
    left = size
    if hasattr(os, "copy_file_range") and isinstance(target, io.BufferedWriter | io.BufferedRandom | io.FileIO):
        try:
            while left:
                done = os.copy_file_range(source.fileno(), target.fileno(), left, start + size - left, place + size - left)
                if not done:
                    break
                left -= done
        except OSError as error:
            if error.errno not in _NOT_HERE:
                raise
    target.seek(place + size - left)
    source.seek(start + size - left)
    while left:
        block = source.read(min(left, _BLOCK))
        if not block:
            raise OSError(errno.EIO, "a finished part is shorter than its record", str(source.name))
        target.write(block)
        left -= len(block)


def npy_bytes(array: np.ndarray) -> bytes:
    """The bytes of a .npy file."""
    return npy_header(array.dtype, array.shape) + np.ascontiguousarray(array).tobytes()


def npy_header(dtype: np.dtype, shape: tuple[int, ...]) -> bytes:
    """The bytes before the data of a .npy file (version 1.0)."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape})
    return buffer.getvalue()
