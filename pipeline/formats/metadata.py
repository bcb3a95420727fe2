"""Metadata of any layout: sidecar parquet files and `.json` members in, row-aligned Arrow columns out.

Everything here is untrusted: files and objects are refused by a MetadataError or made safe value by value, and one
odd value never costs the other rows of its column.
"""

from __future__ import annotations

import base64
import io
import json
import math
import os
import re
from collections.abc import Sequence
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.schema import ALIASES

MAX_JSON_BYTES = 1 << 20
MAX_JSON_DEPTH = 64
MAX_FIELDS = 1024
"""Columns made of `.json` members: rows times fields is memory, and a hostile shard could name new fields in each."""

CORE = pa.schema(
    [(name, pa.string()) for name in ("caption", "url", "sha256")]
    + [(name, pa.int64()) for name in ("width", "height", "original_width", "original_height")]
    + [(name, pa.string()) for name in ("uid", "status")]
)
"""What every layout's metadata is asked for; see `core`."""

MAX_COLUMN_BYTES = 1 << 30
"""Text of one column of one file: a long value that every row refers to takes no room in parquet, and all in memory."""

NO_COLUMN = "caption"
"""The column of nulls that stands for rows without any: neither parquet nor Arrow's `take` counts rows of no column."""

HEX_DIGITS = {"uid": 32, "sha256": 64}
UNSAFE_CHARS = re.compile("[\0\ud800-\udfff]")


class MetadataError(ValueError):
    """Metadata that cannot be used; the text is the short reason."""


def open_parquet(source: str | bytes) -> pq.ParquetFile:
    """Open an untrusted parquet file whose columns are plain Arrow types.

    The footer is searched for extension types before Arrow parses it: a registered extension type (Ray's tensors)
    may unpickle what the file says as soon as the schema is read (reliability.md S6). Texts are read as dictionaries,
    so that `plain` can see how long they are before they take that room.

    Args:
        source: local file, or its bytes.

    Raises:
        MetadataError: not a parquet file, cut short, or it names an extension type.
        OSError: the disk failed.
    """
    with open(source, "rb") if isinstance(source, str) else io.BytesIO(source) as stored:
        footer = _footer(stored)
    if any(pattern in footer for pattern in _EXTENSION_PATTERNS):
        raise MetadataError("extension types are refused")
    try:
        with _parquet_file(source) as file:
            texts = [field.name for field in file.schema_arrow if _is_text(field.type)]
        return _parquet_file(source, texts)
    except (pa.ArrowException, OSError) as error:
        raise damage(error) from None


def _parquet_file(source: str | bytes, texts: Sequence[str] = ()) -> pq.ParquetFile:
    options = {"buffer_size": 1 << 20, "pre_buffer": False, "arrow_extensions_enabled": False}
    return pq.ParquetFile(
        source if isinstance(source, str) else pa.BufferReader(source), read_dictionary=list(texts), **options
    )


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _base64_anywhere(text: bytes) -> tuple[bytes, ...]:
    """The characters that `text` becomes inside base64, one for each alignment to the groups of three bytes."""
    return tuple(base64.b64encode(bytes(i) + text)[math.ceil(i * 4 / 3) : (i + len(text)) * 4 // 3] for i in range(3))


_EXTENSION_PATTERNS = (b"ARROW:extension:", *_base64_anywhere(b"ARROW:extension:"))


def _footer(file: BinaryIO) -> bytes:
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 8))
    tail = file.read()
    length = int.from_bytes(tail[:4], "little")
    if tail[4:] != b"PAR1" or length + 8 > size:
        raise MetadataError("not a parquet file, or cut short")
    file.seek(size - 8 - length)
    return file.read(length)


def damage(error: Exception) -> MetadataError:
    """What Arrow found wrong with a file, as a MetadataError with its first line.

    Raises:
        OSError: `error` itself, where the operating system reported it: a failing disk is no damage in the data.
    """
    if isinstance(error, OSError) and error.errno is not None:
        raise error
    return MetadataError(str(error).partition("\n")[0][:200])


def load_sidecar(path: str) -> pa.Table:
    """Read a whole metadata parquet file as plain columns.

    Args:
        path: local file.

    Returns:
        Its rows in order: dictionaries decoded, invalid UTF-8 replaced, of columns that share a name the first.

    Raises:
        MetadataError: see `open_parquet`; or a column cannot be decoded.
        OSError: the disk failed.
    """
    with open_parquet(path) as file:
        try:
            return plain(file.read(use_threads=False))
        except (pa.ArrowException, OSError) as error:
            raise damage(error) from None


def plain(columns: pa.Table) -> pa.Table:
    """Columns of a freshly read file without dictionaries, large or view strings, invalid UTF-8 and repeated names.

    Raises:
        pa.ArrowException: a column is damaged beyond its strings.
    """
    if not columns.num_columns:
        return pa.table({NO_COLUMN: pa.nulls(len(columns), pa.string())})
    columns = columns.select(sorted({columns.column_names.index(name) for name in columns.column_names}))
    for i, name in enumerate(columns.column_names):
        columns = columns.set_column(i, name, _plain_column(columns.column(i)))
    return columns.replace_schema_metadata(None)


def _plain_column(column: pa.ChunkedArray) -> pa.ChunkedArray:
    if pa.types.is_dictionary(column.type):
        if sum(map(_spread_bytes, column.chunks)) > MAX_COLUMN_BYTES:
            raise pa.ArrowInvalid(f"a column of more than {MAX_COLUMN_BYTES} bytes")
        column = column.cast(column.type.value_type)
    if pa.types.is_large_string(column.type) or pa.types.is_string_view(column.type):
        column = column.cast(pa.string())
    try:
        column.validate(full=True)
    except pa.ArrowInvalid:
        if not pa.types.is_string(column.type):
            raise
        return pa.chunked_array([_decoded(column.cast(pa.binary()))])
    return column


def _spread_bytes(chunk: pa.DictionaryArray) -> int:
    """What the values of a dictionary take when each row has its own; numbers count as nothing."""
    if not (_is_text(chunk.dictionary.type) or pa.types.is_binary(chunk.dictionary.type)):
        return 0
    return int(pc.sum(pc.binary_length(chunk.dictionary).take(chunk.indices).cast(pa.int64())).as_py() or 0)


def _decoded(column: pa.ChunkedArray) -> pa.Array:
    """Bytes as text, with U+FFFD for what is not UTF-8."""
    return pa.array([None if v is None else v.decode("utf-8", "replace") for v in column.to_pylist()], pa.string())


def parse_json(data: bytes) -> dict[str, Any]:
    """Parse one `.json` member.

    Args:
        data: the member's bytes.

    Returns:
        The object; NUL and lone surrogates in its strings, which Arrow or a C string cannot hold, as U+FFFD.

    Raises:
        MetadataError: larger than 1 MiB, not UTF-8, not JSON, not an object, nested deeper than 64 levels, or a number
            that is not finite or has thousands of digits.
    """
    if len(data) > MAX_JSON_BYTES:
        raise MetadataError(f"JSON larger than {MAX_JSON_BYTES} bytes")
    try:
        text = data.decode("utf-8-sig")
        value = _DECODER.decode(text)
    except UnicodeDecodeError:
        raise MetadataError("JSON is not UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise MetadataError(f"not valid JSON: {str(error)[:100]}") from None
    if not isinstance(value, dict):
        raise MetadataError("JSON is not an object")
    level: list[Any] = [value]
    for _ in range(MAX_JSON_DEPTH):
        if not level:
            break
        level = [child for parent in level for child in _children(parent) if isinstance(child, (dict, list))]
    if level:
        raise MetadataError(f"JSON nested deeper than {MAX_JSON_DEPTH} levels")
    # Strict JSON admits neither raw NUL nor surrogates, so only an escape can have made one.
    safe: dict[str, Any] = _safe(value) if "\\u" in text else value
    return safe


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:20]} is not a finite number")
    return number


_DECODER = json.JSONDecoder(parse_float=_finite, parse_constant=_finite)


def _children(value: Any) -> Sequence[Any]:
    return list(value.values()) if isinstance(value, dict) else value


def _safe(value: Any) -> Any:
    if isinstance(value, str):
        return UNSAFE_CHARS.sub("\ufffd", value)
    if isinstance(value, dict):
        return {_safe(key): _safe(child) for key, child in value.items()}
    return [_safe(child) for child in value] if isinstance(value, list) else value


def from_json(objects: Sequence[dict[str, Any] | None]) -> pa.Table:
    """Turn the parsed `.json` of a unit's samples into columns. Never raises on what `parse_json` returns.

    Numbers, booleans, strings and lists of them keep their type. Objects, and fields whose values no single Arrow
    type holds (a string beside a number, integers beyond 64 bits), become text: strings as they are, the rest as JSON.

    Args:
        objects: one per row; None for a row without metadata.

    Returns:
        len(objects) rows; one column per field in the order first seen, at most 1024 (the `.json` member itself is
        kept whole). A field that is null everywhere is a string column; without any field there is one, NO_COLUMN.
    """
    fields_seen = dict.fromkeys(name for fields in objects if fields for name in fields)
    names = list(fields_seen)[:MAX_FIELDS] or [NO_COLUMN]
    return pa.table([_column([fields.get(name) if fields else None for fields in objects]) for name in names], names)


def _column(values: list[Any]) -> pa.Array:
    try:
        array = pa.array(values)
    except (pa.ArrowException, OverflowError):
        return _text(values)
    if pa.types.is_null(array.type):
        return array.cast(pa.string())
    item = array.type
    for _ in range(2):  # lists, and lists of lists such as boxes
        item = item.value_type if pa.types.is_list(item) else item
    # Structs differ from unit to unit, and parquet cannot hold an empty one; a list of nothing has no type yet.
    return _text(values) if pa.types.is_nested(item) or pa.types.is_null(item) else array


def _text(values: Sequence[Any]) -> pa.Array:
    return pa.array([v if v is None or isinstance(v, str) else _json(v) for v in values], pa.string())


def _json(value: Any) -> str:
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return json.dumps(value, ensure_ascii=False, default=str)


def core(columns: pa.Table) -> pa.Table:
    """The columns that every pool has under some name, found by schema.ALIASES without regard to case.

    Args:
        columns: row-aligned metadata, any names and types.

    Returns:
        Schema CORE, as many rows. The first alias that names a column is used. A value that does not fit is null:
        `uid` keeps 32 hex digits and `sha256` 64, both in lower case; sizes are positive whole numbers, in px.
    """
    names = {name.lower(): i for i, name in reversed(list(enumerate(columns.column_names)))}
    found = {}
    for field in CORE:
        alias = next((alias for alias in ALIASES[field.name] if alias in names), None)
        if alias is None:
            found[field.name] = _nulls(len(columns), field.type)
        elif pa.types.is_integer(field.type):
            found[field.name] = _sizes(columns.column(names[alias]))
        else:
            found[field.name] = _strings(columns.column(names[alias]), HEX_DIGITS.get(field.name))
    return pa.table(found, schema=CORE)


def text_column(columns: pa.Table, name: str) -> pa.ChunkedArray | None:
    """The column of this name in any case, as text; None without one. Nested values are null."""
    found = next((i for i, other in enumerate(columns.column_names) if other.lower() == name), None)
    return None if found is None else _strings(columns.column(found), None)


def _strings(column: pa.ChunkedArray, hex_digits: int | None) -> pa.ChunkedArray:
    if pa.types.is_nested(column.type) or pa.types.is_null(column.type):
        return _nulls(len(column), pa.string())
    if not pa.types.is_string(column.type):
        column = pa.chunked_array([_text(column.to_pylist())])
    if hex_digits:
        fits = pc.match_substring_regex(column, f"^[0-9a-fA-F]{{{hex_digits}}}$")
        column = pc.ascii_lower(pc.if_else(fits, column, pa.scalar(None, pa.string())))
    return column


def _sizes(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Positive whole numbers as int64, whether they come as integers, floats or text; else null."""
    kind = column.type
    if pa.types.is_string(kind):
        digits = pc.match_substring_regex(column, r"^[0-9]{1,15}(\.0*)?$")
        column = pc.if_else(digits, column, pa.scalar(None, pa.string()))
    elif not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        return _nulls(len(column), pa.int64())
    value = column.cast(pa.float64(), safe=False)
    whole = pc.and_(pc.equal(value, pc.floor(value)), pc.and_(pc.greater(value, 0), pc.less(value, 2.0**53)))
    return pc.if_else(whole, value, pa.scalar(None, pa.float64())).cast(pa.int64())


def unify(tables: Sequence[pa.Table]) -> pa.Table:
    """Concatenate the columns of several units whose schemas differ. Never raises.

    A column that is absent, or null throughout, takes the type it has elsewhere. Integers become int64 and, beside
    floats, float64 where no value changes; any other mix becomes text: strings as they are, the rest as JSON.

    Args:
        tables: row-aligned columns of each unit, column names unique in each.

    Returns:
        All rows in order; columns in the order first seen.
    """
    names = list(dict.fromkeys(name for table in tables for name in table.column_names))
    return pa.table([_joined(name, tables) for name in names], names)


def _joined(name: str, tables: Sequence[pa.Table]) -> pa.ChunkedArray:
    pieces = [table.column(name) if name in table.column_names else _nulls(len(table), pa.null()) for table in tables]
    kind = _common_type({piece.type for piece in pieces if piece.null_count < len(piece)})
    try:
        joined = [_typed(piece, kind) for piece in pieces]
    except pa.ArrowException:
        kind = pa.string()
        joined = [_typed(pa.chunked_array([_text(piece.to_pylist())]), kind) for piece in pieces]
    return pa.chunked_array([chunk for piece in joined for chunk in piece.chunks], kind)


def _common_type(kinds: set[pa.DataType]) -> pa.DataType:
    """The type that columns of these types are joined in; null where only text holds them all."""
    if len(kinds) <= 1:
        return next(iter(kinds), pa.string())
    if all(pa.types.is_integer(kind) for kind in kinds):
        return pa.int64()
    return pa.float64() if all(pa.types.is_integer(k) or pa.types.is_floating(k) for k in kinds) else pa.null()


def _typed(column: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray:
    return _nulls(len(column), kind) if column.null_count == len(column) else column.cast(kind)


def _nulls(rows: int, kind: pa.DataType) -> pa.ChunkedArray:
    return pa.chunked_array([pa.nulls(rows, kind)])
