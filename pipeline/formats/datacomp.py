"""CommonPool and DataComp: metadata parquet, `.npz` of the same stem, and tars where their stems agree too.

Roles: `sidecar` (the metadata), `npz`, `tar`. The released CommonPool names metadata/ and shards/ differently: its
units have no tar, so images are out of reach, and no sample lacks one.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.arrow import hexes
from pipeline.formats import webdataset
from pipeline.formats.arrays import read_npz
from pipeline.formats.metadata import MetadataError, core, text_column
from pipeline.formats.reading import Reading
from pipeline.formats.rows import as_reading, count_rows, keys_of, load_rows, problem_lines, rows_of, samples_of
from pipeline.schema import SAMPLES
from pipeline.stage import Files, LocalFile, Source, Unit


def group(found: Sequence[tuple[str, Source]]) -> list[Unit]:
    """One unit per metadata file, in the order found.

    Its `.npz` lies beside it, its tar beside it or in a folder `shards` beside its own. A parquet in `shards` belongs
    to a tar where there is a `metadata` folder: it tells nothing of samples that the metadata does not.
    """
    files = dict(found)
    parquets = [path for path in files if path.endswith(".parquet")]
    folders = {posixpath.dirname(path) for path in parquets}
    units = []
    for path in parquets:
        folder, name = posixpath.split(path.removesuffix(".parquet"))
        parent, own = posixpath.split(folder)
        if own == "shards" and posixpath.join(parent, "metadata") in folders:
            continue
        tars = (
            posixpath.join(place, name + suffix)
            for place in (folder, posixpath.join(parent, "shards"))
            for suffix in webdataset.TARS
        )
        tar = next((tar for tar in tars if tar in files), None)
        npz = posixpath.join(folder, f"{name}.npz")
        beside = {role: files[other] for role, other in (("npz", npz), ("tar", tar)) if other in files}
        units.append(Unit(path, {"sidecar": files[path], **beside}))
    return units


class _TarAlone:
    """The files of a unit but for its metadata."""

    def __init__(self, files: Files) -> None:
        self._files = files

    def __contains__(self, role: str) -> bool:
        return role == "tar"

    def open(self, role: str) -> LocalFile:
        return self._files.open(role)

    def read(self, role: str, ranges: Sequence[tuple[int, int]]) -> Iterator[bytes]:
        return self._files.read(role, ranges)


def read(files: Files) -> Reading:
    """The rows of the metadata; where there is a tar, those of the tar first.

    Tar and metadata are joined by the metadata's `key` column, else by the uid in each `KEY.json`.
    """
    columns, damage = load_rows(files, "sidecar")
    if "tar" not in files:
        return as_reading(columns, keys_of(columns, range(len(columns))), damage)
    if text_column(columns, "key") is not None or damage:
        return webdataset.read(files)
    return _joined_by_uid(webdataset.read(_TarAlone(files)), columns)


def images(files: Files, samples: pa.Table) -> Iterator[bytes | None]:
    """The stored image bytes of each sample, in order; None without a tar, or without the sample in it.

    Raises:
        OSError: storage or disk failed.
    """
    return webdataset.images(files, samples) if "tar" in files else iter([None] * len(samples))


def vectors(files: Files, name: str, samples: pa.Table) -> np.ndarray:
    """The vectors that one array of the `.npz` holds for some samples. The array alone is read.

    Args:
        files: of the unit.
        name: the array, such as `l14_img`.
        samples: schema.SAMPLES of the unit, or some of its rows.

    Returns:
        float16, float32 or float64, shape (N, D): a row for each sample, as stored, of any length.

    Raises:
        UserError: the `.npz` has no array of this name; the message has those it has.
        MetadataError: the unit has no `.npz`, or not a row for each row of the metadata.
    """
    if "npz" not in files:
        raise MetadataError("no .npz beside the metadata")
    stored = read_npz(files.open("npz").path, name, count_rows(files, "sidecar"))
    return rows_of(stored, samples)


def _joined_by_uid(tar: Reading, columns: pa.Table) -> Reading:
    """Give the tar's samples the metadata of their uid, and list after them the metadata rows that the tar lacks.

    Of rows that share a uid each sample gets its own, in order, and samples beyond them the last.
    """
    found = core(columns)
    rows_of_uid: dict[str | None, list[int]] = {}
    for row, uid in reversed(list(enumerate(found["uid"].to_pylist()))):
        if uid:
            rows_of_uid.setdefault(uid, []).append(row)
    mine = (rows_of_uid.get(uid, []) for uid in hexes(tar.samples["uid"]))
    source_row = pa.array([(rows.pop() if rows[1:] else rows[0]) if rows else None for rows in mine], pa.int64())
    own = found.take(source_row)
    filled = {
        name: pc.coalesce(tar.samples[name], own[name]) if name in own.column_names else tar.samples[name]
        for name in SAMPLES.names
        if name not in ("uid", "caption")
    }
    joined = samples_of(tar.samples, {**filled, "source_row": source_row})
    listed = as_reading(columns, keys_of(columns, range(len(columns))), ()).samples
    rest = listed.filter(pc.invert(pc.is_in(listed["source_row"], source_row)))
    rest = samples_of(rest, {"problem": ["missing_image"] * len(rest)})
    lines = problem_lines(rest["key"].to_pylist(), rest["problem"].to_pylist(), ())
    samples = pa.concat_tables([joined, rest])
    return Reading(samples, columns.take(samples["source_row"]), pa.concat_tables([tar.problems, lines]))
