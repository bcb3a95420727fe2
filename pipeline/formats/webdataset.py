"""img2dataset's layout: tars of `KEY.jpg`, `KEY.txt`, `KEY.json`, and a sidecar parquet beside each.

In: the files of one unit. Out: its rows in tar order, then the rows that only the sidecar lists. Every member counts
towards a row; sidecar and tar are joined by key, since neither their order nor their counts agree (formats.md 1).

A row has the first problem of `PRIORITY` that holds, and `problems` one line for it that tells the others too.
"""

from __future__ import annotations

import hashlib
import os
import posixpath
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import images as pictures
from pipeline.formats import metadata
from pipeline.formats.reading import Reading
from pipeline.formats.tar import Fault, Member, walk
from pipeline.schema import ALIASES, MEMBER, PROBLEMS, SAMPLES
from pipeline.stage import Files, LocalFile, Source, Unit

TARS = (".tar", ".tar.gz", ".tgz")
IMAGES = ("jpg", "jpeg", "png", "webp")
MAX_TEXT_BYTES = 1 << 20
MAX_NAME_CHARS = 256
MAX_RANGES = 64
"""Images that are asked of storage one by one: a request takes some 30 ms, fetching a whole shard a few seconds."""

DRIVE = re.compile("[A-Za-z]:")
NUMBER = re.compile("(^|/)[0-9]+$")

LOST = LocalFile(os.devnull, 0, "", "there is no tar beside this parquet file")
"""What a unit without its tar is read as: an empty one."""

PRIORITY = (
    "unsafe_name",
    "damaged_member",
    "duplicate_key",
    "missing_image",
    "image_too_large",
    "bad_metadata",
    "missing_caption",
)
"""Each of these may be the cause of those after it."""


@dataclass(slots=True)
class Row:
    """One key of the tar, or one row that only the sidecar lists.

    Attributes:
        name: the key as stored; never leaves this module unless it is safe.
        key: the same, or a stand-in for an unsafe one.
        parts: lower-case suffix -> member, in tar order.
        found: problem -> detail.
        text: the caption's bytes as stored, for the uid.
    """

    name: str
    key: str
    parts: dict[str, Member] = field(default_factory=dict)
    found: dict[str, str] = field(default_factory=dict)
    image: Member | None = None
    caption: str | None = None
    text: bytes = b""
    fields: dict[str, Any] | None = None
    source_row: int | None = None


def group(sources: Sequence[tuple[str, Source]]) -> list[Unit]:
    """One unit per tar, in the order given, with the parquet of the same stem in the same folder as its sidecar.

    A parquet that has a shard's number and lies among tars, but has no tar, is the unit of a lost one.

    Args:
        sources: path below the pool's common folder, and file; whatever is neither tar nor sidecar is ignored.
    """
    files = dict(sources)
    tars = {path: suffix for path in files for suffix in TARS if path.lower().endswith(suffix)}
    stems = {path[: -len(suffix)] for path, suffix in tars.items()}
    folders = {posixpath.dirname(path) for path in tars}
    units = []
    for path in files:
        stem = path.removesuffix(".parquet")
        if path in tars:
            sidecar = path[: -len(tars[path])] + ".parquet"
            beside = {"sidecar": files[sidecar]} if sidecar in files else {}
            units.append(Unit(path, {"tar": files[path], **beside}))
        elif stem != path and stem not in stems and posixpath.dirname(path) in folders and NUMBER.search(stem):
            units.append(Unit(path, {"sidecar": files[path]}))
    return units


def read(files: Files) -> Reading:
    """List one unit: headers, texts and metadata; image bytes are read one at a time, to hash them.

    Raises:
        OSError: storage or disk failed, or the tar changed while it was read.
    """
    local = files.open("tar") if "tar" in files else LOST
    with open(local.path, "rb") as file:
        listing = walk(file, local.bytes)
        faults = _with_damage(listing.faults, local)
        rows, owners = _rows(listing.members)
        _mark_damage(rows, owners, listing.members, faults)
        for row in rows:
            _read_texts(file, row)
        sidecar, keys, lines = _sidecar(files)
        if sidecar is not None:
            lines += _join(rows, sidecar, keys)
        of_json = metadata.from_json([row.fields for row in rows])
        columns = of_json if sidecar is None else sidecar.take(pa.array([r.source_row for r in rows], pa.int64()))
        core = _coalesced(metadata.core(columns), metadata.core(of_json))
        _listed_captions(rows, core)
        identity = _identity(file, rows, core)
    found = [next((reason for reason in PRIORITY if reason in row.found), None) for row in rows]
    lines = [
        *((None, fault.offset, fault.reason, fault.detail) for fault in faults),
        *lines,
        *(_line(row, problem) for row, problem in zip(rows, found, strict=True) if problem),
    ]
    problems = pa.Table.from_pylist([dict(zip(PROBLEMS.names, line, strict=True)) for line in lines], schema=PROBLEMS)
    return Reading(_samples(rows, found, core, identity), columns, problems)


def images(files: Files, samples: pa.Table) -> Iterator[bytes | None]:
    """The stored image bytes of rows of SAMPLES, in their order; None for a row without image.

    Raises:
        OSError: storage or disk failed, or the tar changed.
    """
    wanted = samples["image"].to_pylist()
    ranges = [(image["offset"], image["offset"] + image["bytes"]) for image in wanted if image]
    if len(ranges) > MAX_RANGES:
        files.open("tar")
    stored = files.read("tar", ranges)
    for image in wanted:
        data = None if image is None else next(stored)
        if data is not None and len(data) != image["bytes"]:
            raise OSError(
                f"{image['name']}: {len(data)} of {image['bytes']} bytes; the tar changed since it was listed"
            )
        yield data


def split(name: str) -> tuple[str, str]:
    """Key and lower-case suffix of a member: the path up to the first dot of its file name, and what follows the dot.

    >>> split("a.b/000.seg.PNG")
    ('a.b/000', 'seg.png')
    """
    folder, slash, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return folder + slash + stem, suffix.lower()


def unsafe(name: str) -> str | None:
    """Why a name must not go any further, or None: it ends up in tars that others unpack, in tables and reports."""
    if not name.isprintable():
        return "holds control, invisible or undecodable characters"
    if name.startswith("/") or DRIVE.match(name):
        return "is absolute"
    if "\\" in name:
        return "holds a backslash"
    if ".." in name.split("/"):
        return "leaves its folder"
    if len(name) > MAX_NAME_CHARS:
        return f"is longer than {MAX_NAME_CHARS} characters"
    return None if name and not name.endswith("/") else "is empty"


def _safe(name: str) -> str:
    """A key, or its stand-in."""
    if unsafe(name) is None:
        return name
    return "unsafe-" + hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _rows(members: Sequence[Member]) -> tuple[list[Row], list[Row]]:
    """Rows in the order of their first members, and the row that each member belongs to.

    A suffix that comes again for its key begins a new row, which also takes what follows of the key: two copies of a
    sample are never mixed.
    """
    rows: list[Row] = []
    owners: list[Row] = []
    latest: dict[str, Row] = {}
    spelled: dict[str, str] = {}  # unpacked, `a` and `./a` are one file
    for member in members:
        name, suffix = split(member.name)
        row = latest.get(name)
        if row is None or suffix in row.parts:
            again = row is not None or spelled.setdefault(posixpath.normpath(name), name) != name
            found = {"duplicate_key": f"{member.name[:MAX_NAME_CHARS]!a} comes again"} if again else {}
            row = latest[name] = Row(name, _safe(name), found=found)
            rows.append(row)
        row.parts[suffix] = member
        owners.append(row)
        why = unsafe(member.name) or (None if row.key == name else unsafe(name))
        if why:
            row.found.setdefault("unsafe_name", f"{member.name[:MAX_NAME_CHARS]!a} {why}")
        if not member.intact:
            row.found["damaged_member"] = f"{member.name[:MAX_NAME_CHARS]!a} is cut, or its name is lost"
    return rows, owners


def _with_damage(faults: Sequence[Fault], local: LocalFile) -> list[Fault]:
    """The faults, with what decompression said in the first; it alone is a `truncated`."""
    if local.damage is None:
        return list(faults)
    first = faults[0] if faults else Fault(local.bytes, "truncated", "decompression failed")
    return [first._replace(detail=f"{first.detail}; {local.damage}"), *faults[1:]]


def _mark_damage(
    rows: Sequence[Row], owners: Sequence[Row], members: Sequence[Member], faults: Sequence[Fault]
) -> None:
    """A row that touches a fault, and has fewer members than most rows have, lost some of them there."""
    if not rows:
        return
    counts = Counter(len(row.parts) for row in rows)
    usual = max(counts, key=lambda parts: (counts[parts], parts))
    headers = [member.header for member in members]
    for fault in faults:
        i = bisect_left(headers, fault.offset)
        for row in owners[max(0, i - 1) : i + 1]:
            if len(row.parts) < usual:
                detail = f"{len(row.parts)} of the usual {usual} members, beside {fault.reason} at byte {fault.offset}"
                row.found.setdefault("damaged_member", detail)


def _read_texts(file: BinaryIO, row: Row) -> None:
    """Caption and `.json` of a row, and what is missing or wrong with them."""
    intact = {suffix: member for suffix, member in row.parts.items() if member.intact}
    row.image = next((member for suffix, member in intact.items() if suffix in IMAGES), None)
    if row.image is None:
        row.found["missing_image"] = "no " + ", ".join("." + suffix for suffix in IMAGES)
    elif row.image.bytes > pictures.MAX_BYTES:
        row.found["image_too_large"] = f"{row.image.bytes} bytes, the limit is {pictures.MAX_BYTES}"
    if "json" in intact:
        try:
            row.fields = metadata.parse_json(_text(file, intact["json"]))
        except metadata.MetadataError as error:
            row.found["bad_metadata"] = f".json: {error}"
    if "txt" in intact:
        try:
            row.text = _text(file, intact["txt"])
            row.caption = row.text.decode().replace("\0", "\ufffd")
        except UnicodeDecodeError as error:
            row.caption = row.text.decode("utf-8", "replace").replace("\0", "\ufffd")
            row.found["bad_metadata"] = f".txt is not UTF-8: {error.reason} at byte {error.start}"
        except metadata.MetadataError as error:
            row.found["bad_metadata"] = f".txt: {error}"
    elif row.fields is not None:
        row.caption = _caption(row.fields)
        row.text = (row.caption or "").encode()
    if row.caption is None or not row.caption.strip():
        row.found["missing_caption"] = "no .txt and no caption in a .json" if row.caption is None else "blank"


def _text(file: BinaryIO, member: Member) -> bytes:
    if member.bytes > MAX_TEXT_BYTES:
        raise metadata.MetadataError(f"{member.bytes} bytes, the limit is {MAX_TEXT_BYTES}")
    return _bytes(file, member.offset, member.bytes)


def _caption(fields: dict[str, Any]) -> str | None:
    lower = {name.lower(): value for name, value in fields.items() if isinstance(value, str)}
    return next((lower[alias] for alias in ALIASES["caption"] if alias in lower), None)


def _bytes(file: BinaryIO, offset: int, count: int) -> bytes:
    data = os.pread(file.fileno(), count, offset)
    if len(data) != count:
        raise OSError(f"{file.name} is shorter than when it was listed")
    return data


Line = tuple[str | None, int | None, str, str]
"""One row of PROBLEMS."""


def _sidecar(files: Files) -> tuple[pa.Table | None, list[str | None], list[Line]]:
    """The sidecar, if there is one that can be used, the key of each of its rows, and what is wrong with it."""
    if "sidecar" not in files:
        return None, [], []
    try:
        sidecar = metadata.load_sidecar(files.open("sidecar").path)
    except metadata.MetadataError as error:
        return None, [], [(None, None, "bad_metadata", f"sidecar: {error}")]
    keys = metadata.text_column(sidecar, "key")
    if keys is None:
        return None, [], [(None, None, "bad_metadata", "sidecar: no key column")]
    return sidecar, keys.to_pylist(), []


def _join(rows: list[Row], sidecar: pa.Table, keys: Sequence[str | None]) -> list[Line]:
    """Give each row its row of the sidecar, and append the rows that it alone lists. Returns lines about repeats."""
    lines: list[Line] = []
    first: dict[str, int] = {}
    for i, key in enumerate(keys):
        if key is not None and first.setdefault(key, i) != i:
            detail = f"sidecar: row {i} repeats row {first[key]}, which is used"
            lines.append((_safe(key), None, "duplicate_key", detail))
    for row in rows:
        row.source_row = first.get(row.name.removeprefix("./"))
    there = {row.name.removeprefix("./") for row in rows}
    for i, status in enumerate(metadata.core(sidecar).column("status").to_pylist()):
        key = keys[i]
        if status in (None, "success") and key not in there and (key is None or first[key] == i):
            name = f"sidecar-{i}" if key is None else key
            row = Row(name, _safe(name), source_row=i)
            row.found["missing_image"] = "listed in the sidecar, not in the tar"
            why = unsafe(name)
            if why:
                row.found["unsafe_name"] = f"{name[:MAX_NAME_CHARS]!a} {why}"
            rows.append(row)
    return lines


def _coalesced(columns: pa.Table, otherwise: pa.Table) -> pa.Table:
    return pa.table({name: pc.coalesce(columns.column(name), otherwise.column(name)) for name in columns.column_names})


def _listed_captions(rows: Sequence[Row], core: pa.Table) -> None:
    """Rows that are not in the tar have the sidecar's caption; for all others only the tar's counts."""
    for row, caption in zip(rows, core.column("caption").to_pylist(), strict=True):
        if not row.parts and caption is not None:
            row.caption, row.text = caption, caption.encode()


def _identity(file: BinaryIO, rows: Sequence[Row], core: pa.Table) -> dict[str, list[Any]]:
    """uid, sha256, width and height: the pool's own, else of the stored image, which is read only where one is missing.

    The uid is the first 16 bytes of sha256(image bytes, NUL, caption bytes); without image, of (url or key, NUL,
    caption bytes).
    """
    names = ("uid", "sha256", "width", "height")
    found: list[tuple[Any, ...]] = []
    for row, url, uid, sha256, width, height in zip(
        rows, *(core.column(name).to_pylist() for name in ("url", *names)), strict=True
    ):
        if row.image is None:
            digest = hashlib.sha256((url or row.key).encode())
        elif uid is None or sha256 is None or width is None or height is None:
            digest, head = _hashed(file, row.image)
            sha256 = sha256 or digest.hexdigest()
            if width is None or height is None:
                width, height = pictures.header_px(head) or (None, None)
        if uid is None:
            digest.update(b"\0" + row.text)
        found.append((digest.digest()[:16] if uid is None else bytes.fromhex(uid), sha256, width, height))
    return dict(zip(names, map(list, zip(*found, strict=True)), strict=True)) if found else {name: [] for name in names}


def _hashed(file: BinaryIO, image: Member) -> tuple[Any, bytes]:
    """The running SHA-256 of an image, and its bytes, or the first MAX_BYTES of a larger one."""
    digest, head = hashlib.sha256(), b""
    for start in range(0, image.bytes, pictures.MAX_BYTES):
        data = _bytes(file, image.offset + start, min(pictures.MAX_BYTES, image.bytes - start))
        digest.update(data)
        head = head or data
    return digest, head


def _line(row: Row, problem: str) -> Line:
    others = [f"{reason}: {row.found[reason]}" for reason in PRIORITY if reason in row.found and reason != problem]
    offset = min((member.header for member in row.parts.values()), default=None)
    return row.key, offset, problem, "; ".join([row.found[problem], *others])


def _samples(
    rows: Sequence[Row], problems: Sequence[str | None], core: pa.Table, identity: dict[str, list[Any]]
) -> pa.Table:
    members = [member for row in rows for member in row.parts.values() if member.intact]
    counts = [sum(member.intact for member in row.parts.values()) for row in rows]
    where = {member.header: i for i, member in enumerate(members)}
    images = [None if row.image is None else where[row.image.header] for row in rows]
    names = [
        ascii(member.name)[1 : MAX_NAME_CHARS + 1] if "unsafe_name" in row.found else member.name
        for row in rows
        for member in row.parts.values()
        if member.intact
    ]
    flat = pa.StructArray.from_arrays(
        [
            pa.array(names, pa.string()),
            pa.array([member.offset for member in members], pa.int64()),
            pa.array([member.bytes for member in members], pa.int64()),
        ],
        fields=list(MEMBER),
    )
    offsets = pa.array(np.cumsum([0, *counts], dtype=np.int32))
    columns = {
        **{name: core.column(name) for name in ("url", "original_width", "original_height")},
        **identity,
        "key": [row.key for row in rows],
        "problem": problems,
        "caption": [row.caption for row in rows],
        "source_row": [row.source_row for row in rows],
        "image": flat.take(pa.array(images, pa.int64())),
        "members": pa.ListArray.from_arrays(offsets, flat),
    }
    return pa.table(columns, schema=SAMPLES)
