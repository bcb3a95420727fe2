"""The tables that travel between stages: Arrow schemas, the closed list of problems, column aliases.

Every table of a unit has one row per listed sample, in the order of the shard. Nulls are Arrow nulls.
"""

from __future__ import annotations

import pyarrow as pa

UID = pa.binary(16)
"""Identity of a pair: 128 bits; 32 hex digits wherever a user sees it."""

MEMBER = pa.struct([("name", pa.string()), ("offset", pa.int64()), ("bytes", pa.int64())])
"""One tar member of a sample: its full name, the offset of its data in the (decompressed) tar, and its length."""

SAMPLES = pa.schema(
    [
        ("uid", UID),
        ("key", pa.string()),
        ("problem", pa.string()),  # one of SAMPLE_PROBLEMS, or null
        ("caption", pa.string()),
        ("url", pa.string()),
        ("sha256", pa.string()),  # the pool's own column, else of the image bytes as stored; lower-case hex
        ("width", pa.int64()),  # px; of the stored image: the pool's metadata, else the image's own header
        ("height", pa.int64()),
        ("original_width", pa.int64()),  # px; before the pool was resized, where the metadata gives it
        ("original_height", pa.int64()),
        (
            "source_row",
            pa.int64(),
        ),  # row in the unit's metadata or arrays; null for a tar without sidecar
        ("image", MEMBER),  # the image member among `members`; null without one, and for pools without tars
        ("members", pa.list_(MEMBER)),  # all of the key, in tar order; null for pools without tars
    ]
)

PROBLEMS = pa.schema(
    [
        ("key", pa.string()),  # null for a damaged shard
        ("offset", pa.int64()),  # byte in the (decompressed) file where it was found; null where there is none
        ("reason", pa.string()),  # one of SAMPLE_PROBLEMS or SHARD_PROBLEMS
        ("detail", pa.string()),
    ]
)

SAMPLE_PROBLEMS = (
    "missing_image",
    "missing_caption",
    "unreadable_image",
    "image_too_large",
    "bad_metadata",
    "bad_vector",
    "duplicate_key",
    "damaged_member",
    "unsafe_name",
)
SHARD_PROBLEMS = ("truncated", "bad_header", "not_a_tar", "empty", "trailing_data")


def embeddings(dims: int) -> pa.Schema:
    """Schema of one model's evidence: one row per listed sample, null vectors where it was not embedded.

    A vector is `dims` little-endian float16 values of unit norm. `score` is the cosine of the two (vectors.row_cosine).
    `problem` and `detail` say what only decoding, or the vector itself, showed. VECTORS and SCORES are stored apart:
    who asks for 4 bytes a row should not have to read 2,000.
    """
    vector = pa.binary(2 * dims)
    return pa.schema(
        [
            ("image", vector),
            ("text", vector),
            ("score", pa.float32()),
            ("problem", pa.string()),
            ("detail", pa.string()),
        ]
    )


VECTORS, SCORES = ("image", "text"), ("score", "problem", "detail")
"""Columns of embeddings in each of its two outputs, `vectors` and `scores`."""

ALIVE, PROBLEM = 0, 255
"""Values of STATE.dropped_by beside the number of the step that dropped the row (from 1)."""

STATE = pa.schema([("dropped_by", pa.uint8())])
"""Which step has dropped each listed sample so far; a dropped row never changes again."""

DROPPED = pa.schema(
    [
        ("reason", pa.dictionary(pa.int32(), pa.string())),
        ("value", pa.float64()),
        ("threshold", pa.float64()),
        ("duplicate_of", UID),
    ]
)
"""Why a step dropped what it dropped: one row for each row of the state that has its number, in the same order."""

DECISION = ("uid", "shard", "key", "problem", "kept", "step", "reason", "value", "threshold", "duplicate_of")
"""Columns that every decision has; the scores of models and the pool's columns that a step used follow."""

GROUP_UNITS = 256
"""Units whose rows share one part of a large table, and one task of a cheap stage."""

ALIASES = {
    "uid": ("uid",),
    "key": ("key",),
    "url": ("url",),
    "caption": ("caption", "text", "txt", "top_caption"),
    "width": ("width",),
    "height": ("height",),
    "original_width": ("original_width",),
    "original_height": ("original_height",),
    "sha256": ("sha256",),
    "status": ("status",),
}
"""Core column -> names it goes by in released metadata, compared in lower case, first match wins (formats.md 3, 4)."""
