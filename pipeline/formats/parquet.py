"""Parquet with the images inside (plain bytes, or Hugging Face's struct), or with their urls only. Role: `parquet`.

Images are read a few at a time, so memory does not depend on the size of the file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.formats.metadata import MetadataError, core, damage, open_parquet, plain
from pipeline.formats.reading import Reading
from pipeline.formats.rows import Damage, as_reading, keys_of, problem_lines, samples_of, uid_of
from pipeline.images import header_px
from pipeline.schema import UID
from pipeline.stage import Files, Source, Unit

IMAGE_NAMES = ("image", "jpg", "jpeg", "png", "webp", "img", "bytes")
BATCH_ROWS = 32
"""Images in memory at a time."""


def group(found: Sequence[tuple[str, Source]]) -> list[Unit]:
    """One unit per parquet file, in the order found."""
    return [Unit(path, {"parquet": source}) for path, source in found if path.endswith(".parquet")]


def image_column(schema: pa.Schema) -> str | None:
    """The column that holds the images: the first of IMAGE_NAMES with bytes in it, else the only one with bytes."""
    binary = {column.name.lower(): column.name for column in reversed(list(schema)) if _holds_bytes(column.type)}
    named = next((binary[name] for name in IMAGE_NAMES if name in binary), None)
    return named or (next(iter(binary.values())) if len(binary) == 1 else None)


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


PICTURES = pa.schema([("uid", UID), ("sha256", pa.string()), ("width", pa.int64()), ("height", pa.int64())])
"""What the image bytes of a row say; null without them."""


def read(files: Files) -> Reading:
    """List the rows of one file.

    A row group that cannot be decoded is a line of problems; the others are listed under the numbers they have in the
    file. A null image is the problem `missing_image`, unless the file has no column of images at all.

    Raises:
        OSError: storage or disk failed.
    """
    try:
        with open_parquet(files.open("parquet").path) as file:
            return _read(file)
    except MetadataError as error:
        return as_reading(pa.table({}), pa.chunked_array([], pa.string()), [("bad_metadata", str(error))])


def images(files: Files, samples: pa.Table) -> Iterator[bytes | None]:
    """The stored image bytes of rows of SAMPLES, which are in the order of the file; None for a row without image.

    Raises:
        OSError: storage or disk failed.
        MetadataError: the file changed since it was listed.
    """
    wanted = iter(samples["source_row"].to_pylist())
    row = next(wanted, None)
    if row is None:
        return  # the file may be no parquet at all
    with open_parquet(files.open("parquet").path) as file:
        image = image_column(file.schema_arrow)
        for group, rows in _row_groups(file):
            if row not in rows:
                continue
            stored = _images(file, group, image) if image else iter([None] * len(rows))
            for number, data in zip(rows, stored, strict=True):
                if number == row:
                    yield data
                    row = next(wanted, None)


def _read(file: pq.ParquetFile) -> Reading:
    schema = file.schema_arrow
    image = image_column(schema)
    names = list(dict.fromkeys(name for name in schema.names if name != image))
    tables, pictures = (
        [plain(schema.empty_table().select([schema.names.index(name) for name in names]))],
        [PICTURES.empty_table()],
    )
    numbers: list[int] = []
    lost: list[Damage] = []
    for group, rows in _row_groups(file):
        try:
            table = plain(file.read_row_group(group, names, use_threads=False))
            if image:
                pictures.append(_pictures(_images(file, group, image), core(table)["caption"].to_pylist()))
        except (pa.ArrowException, OSError) as error:
            lost.append(("bad_metadata", f"rows {rows.start} to {rows.stop - 1}: {damage(error)}"))
        else:
            tables.append(table)
            numbers += rows
    columns = pa.concat_tables(tables)
    lost += [] if file.metadata.num_rows else [("empty", "no rows")]
    reading = as_reading(columns, keys_of(columns, numbers), lost)
    own = core(reading.columns)["uid"].is_valid()
    listed = reading.samples["source_row"]
    samples = samples_of(reading.samples, {"source_row": pa.array(numbers, pa.int64()).take(listed)})
    if not image:
        return Reading(samples, reading.columns, reading.problems)
    picture = pa.concat_tables(pictures).take(listed)
    sized = pc.and_(samples["width"].is_valid(), samples["height"].is_valid())
    repeated = pc.fill_null(pc.equal(samples["problem"], "duplicate_key"), False)
    missing = pc.and_not(picture["sha256"].is_null(), repeated)
    seen = {
        "uid": pc.if_else(own, samples["uid"], pc.coalesce(picture["uid"], samples["uid"])),
        "sha256": pc.coalesce(samples["sha256"], picture["sha256"]),
        "width": pc.if_else(sized, samples["width"], picture["width"]),
        "height": pc.if_else(sized, samples["height"], picture["height"]),
        "problem": pc.if_else(missing, "missing_image", samples["problem"]),
    }
    samples = samples_of(samples, seen)
    lines = problem_lines(samples["key"].to_pylist(), samples["problem"].to_pylist(), lost)
    return Reading(samples, reading.columns, lines)


def _row_groups(file: pq.ParquetFile) -> Iterator[tuple[int, range]]:
    """Each row group's number, and the numbers of its rows in the file."""
    start = 0
    for group in range(file.num_row_groups):
        rows = range(start, start + file.metadata.row_group(group).num_rows)
        start = rows.stop
        yield group, rows


def _images(file: pq.ParquetFile, group: int, image: str) -> Iterator[bytes | None]:
    schema = file.schema_arrow
    nested = pa.types.is_struct(schema.field(schema.names.index(image)).type)
    path = f"{image}.bytes" if nested else image
    for batch in file.iter_batches(BATCH_ROWS, row_groups=[group], columns=[path], use_threads=False):
        column = pc.struct_field(batch.column(0), "bytes") if nested else batch.column(0)
        for value in column:
            yield value.as_py()


def _pictures(stored: Iterator[bytes | None], captions: Sequence[str | None]) -> pa.Table:
    rows = []
    for data, caption in zip(stored, captions, strict=True):
        if data is None:
            rows.append((None, None, None, None))
        else:
            rows.append((uid_of(data, caption), hashlib.sha256(data).hexdigest(), *(header_px(data) or (None, None))))
    return pa.Table.from_pylist([dict(zip(PICTURES.names, row, strict=True)) for row in rows], schema=PICTURES)
