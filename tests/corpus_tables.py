"""Hostile and damaged metadata, arrays of vectors and parquet files, each with its truth.

A case is the files of one unit. `arrays()` is for datacomp pools (NAME.parquet and NAME.npz), `images()` for pools of
parquet files that hold their images.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tests.corpus_samples import JPEG, picture, stored

ROWS, DIMS = 4, 8


@dataclass(frozen=True)
class Unit:
    """A unit and what has to be found in it.

    Attributes:
        files: ending -> bytes.
        rows: how many are listed.
        problems: reason -> rows that have it; all others are kept.
        faults: reasons of the faults of the file itself.
    """

    name: str
    files: dict[str, bytes]
    rows: int = ROWS
    problems: dict[str, int] = field(default_factory=dict)
    faults: tuple[str, ...] = ()


class Canary:
    """Leaves a file behind where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return Path.touch, (self.path,)


class Opened(pa.ExtensionType):  # type: ignore[misc]
    """An extension type that unpickles its metadata when a schema is read, as Ray's tensors did."""

    def __init__(self, pickled: bytes) -> None:
        self.pickled = pickled
        super().__init__(pa.int64(), "tests.opened")

    def __arrow_ext_serialize__(self) -> bytes:
        return self.pickled

    @classmethod
    def __arrow_ext_deserialize__(cls, storage_type: pa.DataType, serialized: bytes) -> Opened:
        pickle.loads(serialized)  # noqa: S301
        return cls(serialized)


def parquet(table: pa.Table, **options: Any) -> bytes:
    out = io.BytesIO()
    pq.write_table(table, out, **options)
    return out.getvalue()


def npz(**arrays: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.savez(out, **arrays)
    return out.getvalue()


def metadata(name: str, rows: int = ROWS) -> dict[str, list[Any]]:
    """What a unit says of its rows; the uids are its own."""
    numbers = [f"{name}/{row}" for row in range(rows)]
    return {
        "uid": [hashlib.md5(number.encode()).hexdigest() for number in numbers],
        "url": [f"http://pool/{number}" for number in numbers],
        "text": [f"caption of {number}" for number in numbers],
        "original_width": [640] * rows,
        "original_height": [480] * rows,
        "similarity": [0.25] * rows,
    }


def vectors(name: str, rows: int = ROWS, dims: int = DIMS) -> np.ndarray:
    """float32 (rows, dims), each row its own direction."""
    seed = int.from_bytes(hashlib.md5(name.encode()).digest()[:4], "big")
    return np.random.default_rng(seed).normal(size=(rows, dims)).astype(np.float32)


def extension(path: Path) -> bytes:
    """A parquet file whose column would touch a path if Arrow made it an Opened."""
    opened = Opened(pickle.dumps(Canary(path)))
    return parquet(pa.table({"x": pa.ExtensionArray.from_storage(opened, pa.array([1], pa.int64()))}))


def arrays(canary: Path) -> Iterator[Unit]:
    """Units of a datacomp pool; the first is healthy."""

    def of(name: str, image: np.ndarray | None = None, bad: int = ROWS, **others: np.ndarray) -> Unit:
        found = {"img": vectors(name) if image is None else image, "txt": vectors(f"{name} text"), **others}
        problems = {"bad_vector": bad} if bad else {}
        return Unit(name, {"parquet": parquet(pa.table(metadata(name))), "npz": npz(**found)}, problems=problems)

    def with_row(name: str, value: float, dtype: Any = np.float32, bad: int = 1) -> Unit:
        image = vectors(name).astype(dtype)
        image[1] = value
        return of(name, image, bad)

    yield of("00-healthy", bad=0)
    yield with_row("nan", np.nan)
    yield with_row("infinite", -np.inf)
    yield with_row("zero", 0)
    yield with_row("denormal", 1e-40, bad=0)
    yield with_row("denormal-float16", 6e-8, np.float16, bad=0)
    yield with_row("beyond-float16", 1e30, bad=0)
    yield with_row("largest-float64", 1e308, np.float64, bad=0)
    yield of("nan-in-one-text", bad=1, txt=np.where(np.arange(ROWS)[:, None] == 2, np.nan, vectors("t")))
    yield of("other-dims", vectors("d", dims=DIMS + 1))
    yield of("too-few-rows", vectors("f", ROWS - 1))
    yield of("too-many-rows", vectors("m", ROWS + 1))
    yield of("integers", np.ones((ROWS, DIMS), np.int8))
    yield of("complex", np.ones((ROWS, DIMS), np.complex64))
    yield of("long-double", np.ones((ROWS, DIMS), np.longdouble))
    yield of("structured", np.ones((ROWS, DIMS), "f4,f4"))
    yield of("objects", np.full((ROWS, DIMS), Canary(canary), object))
    yield of("one-axis", np.ones(ROWS, np.float32))
    yield of("three-axes", np.ones((ROWS, DIMS, 1), np.float32))
    yield of("big-endian", vectors("b").astype(">f4"), bad=0)
    yield of("columns-first", np.asfortranarray(vectors("c")), bad=0)
    good = of("good")
    lost = {"bad_vector": ROWS}
    table = good.files["parquet"]
    for name, shape in (("2-60-rows", (1 << 60, DIMS)), ("2-60-dims", (ROWS, 1 << 60))):
        yield Unit(name, {"parquet": parquet(pa.table(metadata(name))), "npz": claiming(shape)}, problems=lost)
    for name, content in (
        ("cut", good.files["npz"][:-40]),
        ("html", b"<html>403</html>" * 40),
        ("empty", b""),
        ("flipped", flipped_in_data(good.files["npz"])),
        ("without-array", npz(other=vectors("o"))),
    ):
        yield Unit(f"npz-{name}", {"parquet": parquet(pa.table(metadata(name))), "npz": content}, problems=lost)
    yield Unit("npz-missing", {"parquet": parquet(pa.table(metadata("missing")))}, problems=lost)

    def told(name: str, table: pa.Table, rows: int = ROWS, problems: dict[str, int] | None = None) -> Unit:
        stored = npz(img=vectors(name, len(table)), txt=vectors(f"{name} text", len(table)))
        return Unit(f"table-{name}", {"parquet": parquet(table), "npz": stored}, rows, problems or {})

    def changed(name: str, **columns: Any) -> pa.Table:
        return pa.table({**metadata(name), **columns})

    none = [None] * ROWS
    yield told("extra-columns", changed("extra", more=[{"a": 1}] * ROWS, flag=[True] * ROWS))
    yield told("int32-sizes", changed("int32", original_width=pa.array([640] * ROWS, pa.int32())))
    yield told("text-sizes", changed("sizes", original_width=["640", "-1", "wide", ""]))
    yield told("number-captions", changed("numbers", text=[1, 2, 3, 4]))
    yield told("not-utf8", changed("utf8", text=pa.array([b"caf\xe9"] * ROWS, pa.binary()).view(pa.string())))
    yield told("dictionary", changed("dictionary", text=pa.array(["the same caption"] * ROWS).dictionary_encode()))
    no_captions = pa.table(metadata("captions")).drop_columns(["text"])
    yield told("no-captions", no_captions, problems={"missing_caption": ROWS})
    yield told("null-captions", changed("nulls", text=pa.array(none, pa.string())), problems={"missing_caption": ROWS})
    yield told("nested-captions", changed("nested", text=[["a"]] * ROWS), problems={"missing_caption": ROWS})
    repeated = metadata("repeated")["uid"][:1] * 2 + metadata("repeated")["uid"][2:]
    yield told("uid-repeated", changed("repeated", uid=repeated), problems={"duplicate_key": 1})
    yield told("not-downloaded", changed("status", status=["success", "failed", None, "failed"]), rows=2)
    many = pa.table(metadata("many", 120)).select(["uid", "text"])
    stored = npz(img=vectors("many", 120), txt=vectors("many text", 120))
    yield Unit("table-120-row-groups", {"parquet": parquet(many, row_group_size=1), "npz": stored}, 120)
    nothing = parquet(pa.table(metadata("none")).slice(0, 0))
    yield Unit("table-without-rows", {"parquet": nothing, "npz": good.files["npz"]}, 0, faults=("empty",))
    for name, content in (
        ("cut", table[:-30]),
        ("html", b"<html>403</html>" * 40),
        ("empty", b""),
        ("footer-of-zeros", table[:100] + bytes(len(table) - 108) + table[-8:]),
        ("extension-type", extension(canary)),
        ("dictionary-bomb", dictionary_bomb()),
    ):
        yield Unit(f"table-{name}", {"parquet": content, "npz": good.files["npz"]}, 0, faults=("bad_metadata",))


def images(canary: Path) -> Iterator[Unit]:
    """Units of a pool of parquet files that hold their images."""

    def of(name: str, rows: int = ROWS, problems: dict[str, int] | None = None, **columns: Any) -> Unit:
        table = pa.table({**metadata(name), **columns})
        return Unit(name, {"parquet": parquet(table)}, rows, problems or {})

    own = [stored(picture(8 + row, 8), "PNG") for row in range(ROWS)]
    yield of("00-healthy", image=own)
    yield of("struct", image=[{"bytes": image, "path": None} for image in own])
    yield of("null-images", jpg=[own[0], None, own[2], None], problems={"missing_image": 2})
    yield of(
        "null-structs",
        image=[{"bytes": own[0], "path": "a"}, None, {"bytes": None, "path": "b"}, None],
        problems={"missing_image": 3},
    )
    yield of("image-of-numbers", image=[1, 2, 3, 4])
    yield of("two-columns-of-bytes", first=own, second=own)
    yield of("large-binary", image=pa.array(own, pa.large_binary()))
    yield of(
        "no-image-and-no-caption",
        image=[own[0], None, own[2], own[3]],
        text=["a", "b", " ", None],
        problems={"missing_image": 1, "missing_caption": 2},
    )
    grouped = parquet(pa.table({**metadata("groups"), "image": [JPEG] * ROWS}), row_group_size=1, compression="none")
    yield Unit("row-groups", {"parquet": grouped})
    lost = pq.ParquetFile(io.BytesIO(grouped)).metadata.row_group(2).column(2)
    page = lost.dictionary_page_offset or lost.data_page_offset
    damaged = grouped[:page] + bytes(8) + grouped[page + 8 :]
    yield Unit("row-group-damaged", {"parquet": damaged}, ROWS - 1, faults=("bad_metadata",))
    yield Unit(
        "without-rows", {"parquet": parquet(pa.table({"image": pa.array([], pa.binary())}))}, 0, faults=("empty",)
    )
    for name, content in (
        ("cut", grouped[:-20]),
        ("html", b"<html>403</html>" * 40),
        ("extension-type", extension(canary)),
        ("dictionary-bomb", dictionary_bomb()),
    ):
        yield Unit(name, {"parquet": content}, 0, faults=("bad_metadata",))


def claiming(shape: tuple[int, ...]) -> bytes:
    """An .npz whose arrays are short and claim a shape."""
    member = io.BytesIO()
    np.lib.format.write_array_header_1_0(member, {"descr": "<f4", "fortran_order": False, "shape": shape})
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        for name in ("img", "txt"):
            file.writestr(f"{name}.npy", member.getvalue() + bytes(64))
    return out.getvalue()


def flipped_in_data(stored: bytes) -> bytes:
    """The same .npz with a bit of the first array flipped, which its checksum shows."""
    at = stored.index(b"\x93NUMPY") + 130
    return stored[:at] + bytes([stored[at] ^ 1]) + stored[at + 1 :]


def dictionary_bomb() -> bytes:
    """A parquet file of some kB whose captions take 1.5 GiB: one of 1 MiB, 1,536 times."""
    caption = pa.DictionaryArray.from_arrays(pa.array([0] * 1536, pa.int32()), pa.array(["x" * (1 << 20)]))
    return parquet(pa.table({"text": caption}), compression="zstd")
