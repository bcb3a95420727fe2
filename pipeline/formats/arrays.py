"""Precomputed vectors of a unit: a `.npy` file, or one member of an `.npz`, in; an (N, D) array out. Never a pickle."""

from __future__ import annotations

import errno
import tokenize
import zipfile
import zlib
from typing import IO

import numpy as np

from pipeline.errors import UserError
from pipeline.formats.metadata import MetadataError

MAX_DIMS = 1 << 16
FAULTS = (
    ValueError,
    EOFError,
    SyntaxError,
    tokenize.TokenError,
    zlib.error,
    zipfile.BadZipFile,
    NotImplementedError,
    RuntimeError,
)
"""What zipfile and numpy raise for damaged or foreign bytes."""


def read_npy(path: str, rows: int) -> np.ndarray:
    """Map the vectors of one `.npy` file; memory is that of the rows looked at.

    Args:
        path: local file.
        rows: how many the metadata has.

    Returns:
        float16, float32 or float64, shape (rows, D), read only.

    Raises:
        MetadataError: not such an array, or another number of rows.
    """
    try:
        with open(path, "rb") as file:
            _check_header(file, rows)
        vec_ND: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
        return vec_ND
    except MetadataError:
        raise
    except FAULTS as error:
        raise _damage(error) from None


def read_npz(path: str, name: str, rows: int) -> np.ndarray:
    """Read one array of an `.npz` file and none of the others.

    Args:
        path: local file.
        name: the array, without `.npy`.
        rows: how many the metadata has.

    Returns:
        float16, float32 or float64, shape (rows, D).

    Raises:
        UserError: the file has no array of this name; the message has those it has.
        MetadataError: the file is damaged, the array is none of vectors, or it has another number of rows.
    """
    try:
        with zipfile.ZipFile(path) as file:
            names = [member.removesuffix(".npy") for member in file.namelist()]
            if name not in names:
                raise UserError(f"models: no array {name!r} in the pool's .npz files; they have: {', '.join(names)}")
            with file.open(f"{name}.npy") as member:
                _check_header(member, rows)
            with file.open(f"{name}.npy") as member:
                return np.lib.format.read_array(member, allow_pickle=False)
    except MetadataError:
        raise
    except OSError as error:
        # A damaged directory can send zipfile to a place before the file's beginning.
        if error.errno != errno.EINVAL:
            raise
        raise _damage(error) from None
    except FAULTS as error:
        raise _damage(error) from None


def _check_header(file: IO[bytes], rows: int) -> None:
    """Before anything is allocated: a header may claim any shape, and one short of memory is no answer."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    if len(shape) != 2 or dtype.kind != "f" or dtype.itemsize > 8 or not 0 < shape[1] <= MAX_DIMS:
        raise MetadataError(f"an array of vectors expected, found shape {shape} of {dtype}")
    if shape[0] != rows:
        raise MetadataError(f"{shape[0]} vectors for {rows} rows of metadata")


def _damage(error: Exception) -> MetadataError:
    return MetadataError(f"damaged array: {str(error).partition(chr(10))[0][:200]}")
