"""Samples of a layout without tars: the rows of a metadata table in, a Reading out."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.formats.metadata import MetadataError, core, load_sidecar, open_parquet, text_column
from pipeline.formats.reading import Reading
from pipeline.schema import PROBLEMS, SAMPLES
from pipeline.stage import Files

Damage: TypeAlias = tuple[str, str]
"""Reason and detail of what is wrong with a file as a whole."""


def uid_of(identity: bytes, caption: str | None) -> bytes:
    """The 16 bytes that name a pair without a uid of its own: sha256(identity, NUL, caption), cut.

    Args:
        identity: the image's bytes as stored; without them its url or path in UTF-8.
        caption: None counts as empty.
    """
    return hashlib.sha256(identity + b"\0" + (caption or "").encode()).digest()[:16]


def keys_of(columns: pa.Table, numbers: Sequence[int]) -> pa.ChunkedArray:
    """The key of each row: its own uid, else what its `key` column says, else its number in the file."""
    number = pa.chunked_array([[str(i) for i in numbers]], pa.string())
    named = text_column(columns, "key")
    return pc.coalesce(core(columns)["uid"], *([] if named is None else [named]), number)


def load_rows(files: Files, role: str) -> tuple[pa.Table, list[Damage]]:
    """All rows of a metadata file, or none and the reason."""
    try:
        columns = load_sidecar(files.open(role).path)
    except MetadataError as error:
        return pa.table({}), [("bad_metadata", str(error))]
    return columns, [] if len(columns) else [("empty", "no rows")]


def count_rows(files: Files, role: str) -> int:
    """Rows of a metadata file, from its footer.

    Raises:
        MetadataError: see `open_parquet`.
    """
    with open_parquet(files.open(role).path) as file:
        return int(file.metadata.num_rows)


def rows_of(stored: np.ndarray, samples: pa.Table) -> np.ndarray:
    """The rows of a unit's array that belong to the samples; NaN for a sample that the metadata does not list."""
    row = samples["source_row"]
    vec_ND = (
        stored[pc.fill_null(row, 0).to_numpy()]
        if len(stored)
        else np.empty((len(samples), stored.shape[1]), stored.dtype)
    )
    vec_ND[row.is_null().to_numpy()] = np.nan
    return vec_ND


def as_reading(columns: pa.Table, key: pa.ChunkedArray, damage: Sequence[Damage]) -> Reading:
    """List the rows whose status is `success`, null or absent, of a pool without images.

    That a row has no image is no problem here. That it has no caption is, or a key that an earlier row of the unit has.

    Args:
        columns: all rows of the metadata, in order.
        key: string, one per row.
        damage: what is wrong with the file itself.
    """
    found = core(columns)
    listed = listed_rows(found)
    path = text_column(columns, "image_path")
    image = pc.coalesce(found["url"], *([] if path is None else [path]), key)
    found, columns = found.take(listed), columns.take(listed)
    keys, captions = key.take(listed).to_pylist(), found["caption"].to_pylist()
    uids = [
        bytes.fromhex(own) if own else uid_of(identity.encode(), caption)
        for own, identity, caption in zip(
            found["uid"].to_pylist(), image.take(listed).to_pylist(), captions, strict=True
        )
    ]
    problems = [row_problem(*row) for row in zip(captions, repeats(keys), strict=True)]
    own = {"uid": uids, "key": keys, "problem": problems, "source_row": listed}
    return Reading(samples_of(found, own), columns, problem_lines(keys, problems, damage))


def listed_rows(found: pa.Table) -> pa.Array:
    """int64: the rows of core metadata that count as samples: not those that were never downloaded."""
    return pa.array(np.flatnonzero(pc.fill_null(pc.equal(found["status"], "success"), True)), pa.int64())


def row_problem(caption: str | None, repeated: bool) -> str | None:
    """The first problem that metadata alone shows."""
    if repeated:
        return "duplicate_key"
    return None if caption and caption.strip() else "missing_caption"


def repeats(keys: Sequence[str]) -> list[bool]:
    """For each key, whether an earlier one equals it."""
    first: dict[str, int] = {}
    return [first.setdefault(key, i) != i for i, key in enumerate(keys)]


def samples_of(found: pa.Table, own: dict[str, Any]) -> pa.Table:
    """schema.SAMPLES: the columns of `own` (Arrow or lists), else those of `found`, else null."""
    nulls = {field.name: pa.nulls(len(found), field.type) for field in SAMPLES}
    columns = {**nulls, **dict(zip(found.column_names, found.columns, strict=True)), **own}
    return pa.table({name: columns[name] for name in SAMPLES.names}, schema=SAMPLES)


def problem_lines(keys: Sequence[str], problems: Sequence[str | None], damage: Sequence[Damage]) -> pa.Table:
    """schema.PROBLEMS: a line without key for each damage of the file, then one for each row with a problem."""
    lines: list[tuple[str | None, str, str | None]] = [(None, reason, detail) for reason, detail in damage]
    lines += [(key, reason, None) for key, reason in zip(keys, problems, strict=True) if reason]
    return pa.Table.from_pylist(
        [{"key": key, "offset": None, "reason": reason, "detail": detail} for key, reason, detail in lines],
        schema=PROBLEMS,
    )
