"""NumPy files of a known shape: checked without being read, written without memory maps."""

import io
import math
import os
import threading
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

__all__ = ["ArrayWriter", "array_bytes", "is_whole_array"]


def array_bytes(shape: tuple[int, ...], dtype: DTypeLike) -> int:
    """Return the size of an array's `.npy` file in bytes."""
    return len(_header(shape, dtype)) + math.prod(shape) * np.dtype(dtype).itemsize


def is_whole_array(path: Path, shape: tuple[int, ...], dtype: DTypeLike) -> bool:
    """Return whether a `.npy` file has the header and the size of such an array.

    Its values are not read.
    """
    header = _header(shape, dtype)
    try:
        if path.stat().st_size != array_bytes(shape, dtype):
            return False
        with path.open("rb") as file:
            return file.read(len(header)) == header
    except OSError:
        return False


def _header(shape: tuple[int, ...], dtype: DTypeLike) -> bytes:
    """Return the bytes before the values, as `numpy.save` writes them for C order."""
    stream = io.BytesIO()
    descr = np.lib.format.dtype_to_descr(np.dtype(dtype))
    np.lib.format.write_array_header_1_0(
        stream, {"descr": descr, "fortran_order": False, "shape": shape}
    )
    return stream.getvalue()


class ArrayWriter:
    """Writes a `.npy` file row by row, in any order and from several threads.

    Used in a `with` block. Rows that are not written are zeros, which take no room on most disks.
    A full disk raises an `OSError`; a process that writes to a memory map is killed there.

    Args:
        path: the file, which is replaced.
        shape: of the array; a row is what one index of the first dimension gives.
        dtype: of the array.
    """

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: DTypeLike) -> None:
        self.shape = shape
        self.dtype = np.dtype(dtype)
        self._header = _header(shape, dtype)
        self._lock = threading.Lock()
        self._file = path.open("wb")

    def __enter__(self) -> "ArrayWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with self._file:
            if kind is None:
                self._file.seek(0)
                self._file.write(self._header)
                self._file.truncate(array_bytes(self.shape, self.dtype))
                self._file.flush()
                os.fsync(self._file.fileno())

    def __setitem__(self, index: int, row: ArrayLike) -> None:
        """Write a row.

        Args:
            index: from 0 to `shape[0] - 1`.
            row: of the shape `shape[1:]`.

        Raises:
            IndexError: there is no such row.
            OSError: it cannot be written.
        """
        if not 0 <= index < self.shape[0]:
            raise IndexError(f"row {index} of {self.shape[0]}")
        values = np.empty(self.shape[1:], self.dtype)
        values[...] = row
        with self._lock:
            self._file.seek(len(self._header) + index * values.nbytes)
            self._file.write(values.tobytes())
