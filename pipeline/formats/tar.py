"""A strict reader of tar headers, and the headers that we write.

In: any bytes. Out: where the data of every regular file lies, and every fault by its offset. Nothing is extracted, no
content raises, and an archive is complete only where two zero blocks end it: Python's tarfile ends in silence at a
bad header, a zero block or a cut (reliability.md 0, findings 2 and 3).
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO, NamedTuple

BLOCK = 512
END = bytes(2 * BLOCK)
"""What ends an archive. No padding to records of 10,240 bytes: no reader needs it."""

MAX_MEMBER_BYTES = 1 << 30
"""A header that states more is damaged: pools hold images, texts and small arrays."""

MAX_EXTENDED_BYTES = 1 << 20
"""Largest pax or GNU long-name header; it is read into memory."""

REGULAR = (b"0", b"\0", b"7")
EXTENDED = (b"x", b"g", b"X", b"L", b"K")
WITHOUT_DATA = (b"1", b"2", b"3", b"4", b"5", b"6")
SPARSE = b"S"

FIRST_SCAN_BYTES, MAX_SCAN_BYTES = 1 << 12, 1 << 20


class Member(NamedTuple):
    """One regular file.

    Attributes:
        name: as stored, decoded as UTF-8; bytes that are not UTF-8 are lone surrogates (surrogateescape).
        header: offset of its first header block, extended headers included.
        offset: of its data.
        bytes: length of its data as stated.
        intact: False where the file ends before the data does, or the name was lost with a damaged extended header.
    """

    name: str
    header: int
    offset: int
    bytes: int
    intact: bool


class Fault(NamedTuple):
    """One damage of the archive: `reason` is one of schema.SHARD_PROBLEMS, `offset` the byte where it begins."""

    offset: int
    reason: str
    detail: str


@dataclass(frozen=True)
class Listing:
    """What a walk found, in the order of the file; `skipped` counts links, folders, devices and sparse files."""

    members: list[Member]
    faults: list[Fault]
    skipped: int


class Header(NamedTuple):
    """The fields of one valid header block that matter here; `bytes` is 0 for kinds that have no data."""

    name: bytes
    kind: bytes
    bytes: int
    sparse: bool


@dataclass
class Extended:
    """What pax and GNU headers say about the next member (or, for `g`, about all that follow)."""

    name: bytes | None = None
    bytes: int | None = None
    sparse: bool = False


@dataclass
class Walk:
    """The state of one walk."""

    file: BinaryIO
    size: int
    members: list[Member] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    skipped: int = 0
    headers: int = 0
    zeros_only: bool = True
    ended: bool = False
    shared: Extended = field(default_factory=Extended)
    own: Extended = field(default_factory=Extended)
    first: int | None = None  # the first extended header of the coming member
    lost_name: bool = False

    def fault(self, offset: int, reason: str, detail: str) -> None:
        self.faults.append(Fault(offset, reason, detail))

    def forget(self) -> None:
        if self.first is not None:
            self.own, self.first, self.lost_name = Extended(), None, False


def walk(file: BinaryIO, size: int) -> Listing:
    """List the regular files of a tar, whatever its state. Linear in `size`; memory grows with the members only.

    Accepted: POSIX and GNU `ustar`, and old headers without magic, each by its checksum; pax `x` and `g` (path, size)
    and GNU `L`. After a block that is no header the search goes on, block by block, for the next valid one.

    Args:
        file: seekable; only headers are read, and data where a header is missing.
        size: its length in bytes.

    Returns:
        Members and faults. One `bad_header` per gap; `truncated` without two zero blocks at the end; `trailing_data`
        after them, whose members, if it holds an archive, are listed too; `empty`; `not_a_tar` without any header.

    Raises:
        OSError: the disk failed.
    """
    state = Walk(file, size)
    pos = 0
    while pos < size:
        block = _read(file, pos, BLOCK)
        header = _parse(block)
        if isinstance(header, Header) and header.kind not in EXTENDED:
            header = _overridden(header, state)
        if isinstance(header, str):
            pos = _gap(state, pos, header)
            continue
        state.headers += 1
        if state.ended:
            state.fault(pos, "trailing_data", "another archive follows the end; its members are listed too")
            state.ended = False
        pos = _take(state, pos, header)
    return _finished(state)


def _take(state: Walk, pos: int, header: Header) -> int:
    """Note what one valid header says; give the offset after its data."""
    offset = pos + BLOCK
    if header.sparse:
        offset = _after_sparse_map(state, offset)
    stop = offset + header.bytes
    if header.kind in EXTENDED:
        state.first = pos if state.first is None else state.first
        if stop <= state.size:
            _extend(state, pos, header)
    elif header.kind in REGULAR and not (state.own.sparse or (header.kind == b"\0" and header.name.endswith(b"/"))):
        name = header.name.decode("utf-8", "surrogateescape")
        first = pos if state.first is None else state.first
        intact = stop <= state.size and not state.lost_name
        state.members.append(Member(name, first, offset, header.bytes, intact))
        state.forget()
    else:
        state.skipped += 1
        state.forget()
    return offset + -(-header.bytes // BLOCK) * BLOCK


def _gap(state: Walk, pos: int, why: str) -> int:
    """Deal with a block that is no header: the end, or damage up to the next header. Gives the offset to go on at."""
    state.forget()
    if _read(state.file, pos, len(END)) == END:
        state.ended = True
        return next((at for at, block in _blocks(state.file, pos, state.size) if block.strip(b"\0")), state.size)
    following, zeros = _resync(state.file, pos, state.size)
    state.zeros_only = state.zeros_only and zeros == pos
    if state.ended:
        more = "" if following == state.size else "; an archive follows and its members are listed too"
        state.fault(pos, "trailing_data", f"{min(zeros, state.size) - pos} bytes after the end{more}")
        # The archive that follows, if one does, has to have an end of its own.
        state.ended = following == state.size
    elif following < state.size:
        state.fault(pos, "bad_header", f"{why}; the next valid header is {following - pos} bytes on")
    else:
        if zeros > pos and pos + BLOCK <= state.size:
            state.fault(pos, "bad_header", f"{why}; no valid header follows")
        state.ended = state.size - zeros >= len(END)
    return following


def _finished(state: Walk) -> Listing:
    members, faults, size = state.members, state.faults, state.size
    if not state.headers:
        reason, detail = ("empty", "no data") if state.zeros_only else ("not_a_tar", "no valid header anywhere")
        return Listing([], [Fault(0, reason, detail)], 0)
    if not state.ended:
        detail = "no two zero blocks at the end"
        if members and members[-1].offset + members[-1].bytes > size:
            cut = members[-1]
            detail = f"{cut.name[:256]!a} is cut: {max(0, size - cut.offset)} of {cut.bytes} bytes"
        state.fault(size, "truncated", detail)
    if not members:
        state.fault(0, "empty", f"no regular file; {state.skipped} members of other kinds")
    return Listing(members, faults, state.skipped)


def _read(file: BinaryIO, offset: int, count: int) -> bytes:
    file.seek(offset)
    return file.read(count)


def _blocks(file: BinaryIO, start: int, size: int) -> Iterator[tuple[int, bytes]]:
    """All blocks from `start`, the last maybe short. Reads grow, so that many short scans stay linear in `size`."""
    count = FIRST_SCAN_BYTES
    while start < size:
        chunk = _read(file, start, count)
        if not chunk:
            return
        for at in range(0, len(chunk), BLOCK):
            yield start + at, chunk[at : at + BLOCK]
        start += len(chunk)
        count = min(2 * count, MAX_SCAN_BYTES)


def _resync(file: BinaryIO, start: int, size: int) -> tuple[int, int]:
    """Offset of the next valid header after the block at `start`, or `size`; and where the zeros before it begin."""
    zeros = start
    for at, block in _blocks(file, start, size):
        if block.strip(b"\0"):
            if at > start and isinstance(_parse(block), Header):
                return at, zeros
            zeros = at + BLOCK
    return size, zeros


OCTAL = re.compile(rb" *([0-7]+)(?:[ \0].*)?", re.DOTALL)


def _parse(block: bytes) -> Header | str:
    """The header in a block, or why it is none."""
    if len(block) < BLOCK:
        return "cut header"
    checksum = block[148:156]
    stated = OCTAL.fullmatch(checksum)
    if stated is None:
        return "no checksum"
    # Adler-32's lower half is 1 + the sum of the bytes, modulo 65,521: 50 times faster than sum(). The checksum field
    # itself counts as 8 spaces.
    rest = int(stated[1], 8) + sum(checksum) - 8 * ord(" ")
    if zlib.adler32(block) & 0xFFFF != (1 + rest) % 65521 and sum(block) - 256 * _high(block) != rest:
        return "wrong checksum"
    length = _size(block[124:136])
    if length is None:
        return "negative or malformed size"
    kind = block[156:157]
    if kind in WITHOUT_DATA:
        length = 0
    name = block[:100].partition(b"\0")[0]
    if block[257:263] == b"ustar\0" and block[345]:
        name = block[345:500].partition(b"\0")[0] + b"/" + name
    return Header(name, kind, length, kind == SPARSE and block[482] != 0)


def _high(block: bytes) -> int:
    """Bytes that some old writers summed as negative."""
    return sum(value > 127 for value in block)


def _size(text: bytes) -> int | None:
    """A size field: octal, base-256 (first byte 0x80), or blank; None where negative or malformed."""
    if text[0] == 0x80:
        return int.from_bytes(text[1:], "big")
    number = OCTAL.fullmatch(text)
    if number is None:
        return None if text.strip(b" \0") else 0
    return int(number[1], 8)


def _overridden(header: Header, state: Walk) -> Header | str:
    """The header of a member with what extended headers say of it; or why its size cannot be true."""
    own, shared = state.own, state.shared
    name = own.name if own.name is not None else shared.name
    length = own.bytes if own.bytes is not None else shared.bytes
    if name is not None or length is not None:
        header = header._replace(
            name=header.name if name is None else name,
            bytes=header.bytes if length is None or header.kind in WITHOUT_DATA else length,
        )
    if header.bytes > MAX_MEMBER_BYTES:
        return f"a size of {header.bytes} bytes is over the limit of {MAX_MEMBER_BYTES}"
    return header


def _extend(state: Walk, pos: int, header: Header) -> None:
    """Read one extended header. A broken one is a fault, and the name of the next member is lost with it."""
    if header.bytes > MAX_EXTENDED_BYTES:
        state.fault(pos, "bad_header", f"an extended header of {header.bytes} bytes is over the limit")
        state.lost_name = True
        return
    data = _read(state.file, pos + BLOCK, header.bytes)
    if header.kind == b"L":
        state.own.name = data.partition(b"\0")[0]
    elif header.kind != b"K" and not _pax(data, state.shared if header.kind == b"g" else state.own):
        state.fault(pos, "bad_header", "malformed pax header")
        state.lost_name = True


def _pax(data: bytes, into: Extended) -> bool:
    """Take path and size from pax records, each `LENGTH KEY=VALUE\\n`; False where a record is malformed."""
    pos = 0
    while pos < len(data) and data[pos]:
        space = data.find(b" ", pos, pos + 20)
        digits = data[pos:space]
        if space < 0 or not digits.isdigit():
            return False
        stop = pos + int(digits)
        key, equals, value = data[space + 1 : stop].partition(b"=")
        if stop > len(data) or not equals or not value.endswith(b"\n"):
            return False
        if key == b"path":
            into.name = value[:-1]
        elif key == b"size":
            if not re.fullmatch(rb"[0-9]{1,20}\n", value):
                return False
            into.bytes = int(value)
        elif key.startswith(b"GNU.sparse."):
            into.sparse = True
        pos = stop
    return True


def _after_sparse_map(state: Walk, offset: int) -> int:
    """Old GNU sparse files: blocks of their map stand between header and data, each saying whether one follows."""
    more = True
    while more:
        block = _read(state.file, offset, BLOCK)
        offset += BLOCK
        more = len(block) == BLOCK and block[504] != 0
    return offset


def member_header(name: str, bytes: int, mtime: int = 0) -> bytes:
    """Header blocks for one regular file, to be followed by its data and zeros up to a whole block.

    The same bytes on every machine: mode 0644, owner 0, no owner names. A name longer than 100 bytes or not ASCII goes
    into a pax header, a size of 8 GiB or more into base-256.

    Args:
        name: path within the archive.
        bytes: length of the data.
        mtime: seconds since 1970.
    """
    path = name.encode()
    if len(path) <= 100 and path.isascii():
        return _ustar(path, b"0", bytes, mtime)
    record = b" path=" + path + b"\n"
    length = len(record) + 1
    while len(record) + len(b"%d" % length) != length:
        length += 1
    record = b"%d" % length + record
    short = name.encode("ascii", "replace")[:100]
    return _ustar(b"PaxHeader", b"x", length, mtime) + record + padding(length) + _ustar(short, b"0", bytes, mtime)


def padding(count: int) -> bytes:
    """The zeros after `count` bytes of data."""
    return b"\0" * (-count % BLOCK)


def _ustar(name: bytes, kind: bytes, count: int, mtime: int) -> bytes:
    size = b"%011o\0" % count if count < 8**11 else b"\x80" + count.to_bytes(11, "big")
    owner = b"0000000\0"
    head = name.ljust(100, b"\0") + b"0000644\0" + owner * 2 + size + b"%011o\0" % mtime
    tail = kind + b"\0" * 100 + b"ustar\00000" + b"\0" * 247
    # The checksum counts itself as 8 spaces. A header of ours sums to less than 65,521, where Adler-32's lower half is
    # 1 + the sum of the bytes.
    checksum = (zlib.adler32(head + b" " * 8 + tail) & 0xFFFF) - 1
    return head + b"%06o\0 " % checksum + tail
