"""Output of `clip-retrieval inference`: metadata/, img_emb/ and text_emb/ in; samples and their vectors out, no images.

Roles: `metadata` (metadata_0000.parquet), `img_emb` (img_emb_0000.npy), `text_emb` (text_emb_0000.npy).
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import UserError
from pipeline.formats.arrays import read_npy
from pipeline.formats.metadata import MetadataError, text_column
from pipeline.formats.reading import Reading
from pipeline.formats.rows import as_reading, count_rows, keys_of, load_rows, rows_of
from pipeline.stage import Files, Source, Unit

NUMBERED = re.compile(r"(metadata|img_emb|text_emb)_(\d+)\.(parquet|npy)$")
ARRAYS = ("img_emb", "text_emb")


def group(found: Sequence[tuple[str, Source]]) -> list[Unit]:
    """One unit per metadata file, in the order found, with the arrays of its number beside its folder."""
    by_role = {
        (posixpath.dirname(posixpath.dirname(path)), match[1], match[2]): (path, source)
        for path, source in found
        if (match := NUMBERED.match(posixpath.basename(path)))
        and posixpath.basename(posixpath.dirname(path)) == match[1]
    }
    units = []
    for (base, role, number), (path, source) in by_role.items():
        if role == "metadata":
            arrays = {name: by_role[base, name, number][1] for name in ARRAYS if (base, name, number) in by_role}
            units.append(Unit(path, {"metadata": source, **arrays}))
    return units


def read(files: Files) -> Reading:
    """The rows of the metadata. Their key is `image_path`, the sample's key in its tar, where that is unique."""
    columns, damage = load_rows(files, "metadata")
    path = text_column(columns, "image_path")
    unique = path is not None and pc.count_distinct(path, mode="only_valid").as_py() == len(path)
    key = path if unique else keys_of(columns.select([]), range(len(columns)))
    return as_reading(columns, key, damage)


def images(files: Files, samples: pa.Table) -> Iterator[bytes | None]:
    """None for each sample: the layout has no images."""
    return iter([None] * len(samples))


def vectors(files: Files, name: str, samples: pa.Table) -> np.ndarray:
    """The vectors that `img_emb` or `text_emb` holds for some samples.

    Args:
        files: of the unit.
        name: the array.
        samples: schema.SAMPLES of the unit, or some of its rows.

    Returns:
        float16, float32 or float64, shape (N, D): a row for each sample, as stored, of any length.

    Raises:
        UserError: there is no such array in this layout.
        MetadataError: the unit has no file of it, or not a row for each row of the metadata.
    """
    if name not in ARRAYS:
        raise UserError(f"models: no array {name!r} in a clip_retrieval pool; it has: {', '.join(ARRAYS)}")
    if name not in files:
        raise MetadataError(f"no {name} file of this number")
    return rows_of(read_npy(files.open(name).path, count_rows(files, "metadata")), samples)
