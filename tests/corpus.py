"""Damaged and hostile tars as bytes, each with its truth: what a strict reader keeps, refuses and reports.

The healthy base is img2dataset's: `KEY.jpg`, `KEY.txt`, `KEY.json` for the keys of `KEYS`, written by Python's tarfile.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.stage import LocalFile

KEYS = tuple(f"00000{i:04d}" for i in range(6))
BLOCK = 512
END = bytes(2 * BLOCK)


@dataclass(frozen=True)
class Case:
    """A shard and what has to be found in it.

    Attributes:
        kept: keys of the rows without a problem, in order.
        problems: (key, problem) of the other rows, in order; a key of None stands for any stand-in.
        faults: reasons of the faults of the shard, in order of their offsets.
    """

    name: str
    data: bytes
    kept: Sequence[str] = KEYS
    problems: Sequence[tuple[str | None, str]] = ()
    faults: Sequence[str] = ()


@dataclass
class Shard:
    """A tar under construction: blocks are appended as they are, so that any of them can be wrong."""

    data: bytearray = field(default_factory=bytearray)

    def add(self, name: str, content: bytes = b"", **fields: object) -> Shard:
        """Append a member in tarfile's own bytes; `fields` are attributes of TarInfo."""
        self.data += member(name, content, **fields)
        return self

    def sample(self, key: str) -> Shard:
        for suffix, content in parts(key).items():
            self.add(f"{key}.{suffix}", content)
        return self

    def samples(self, keys: Iterable[str]) -> Shard:
        for key in keys:
            self.sample(key)
        return self

    def raw(self, data: bytes) -> Shard:
        self.data += data
        return self

    def closed(self) -> bytes:
        return bytes(self.data) + END


def parts(key: str) -> dict[str, bytes]:
    """The three members of a sample; each content is its own, and the picture is longer than a block."""
    caption = f"caption of {key!a}"
    meta = {"caption": caption, "url": f"http://pool/{key}", "key": key, "width": 32, "height": 24}
    return {
        "jpg": b"\xff\xd8" + key.encode("utf-8", "surrogateescape") * 90,
        "txt": caption.encode(),
        "json": json.dumps(meta).encode(),
    }


def member(name: str, content: bytes = b"", *, size: int | None = None, **fields: object) -> bytes:
    """Header and padded content; `size` is what the header states, if not the truth."""
    info = tarfile.TarInfo(name)
    info.size = len(content) if size is None else size
    for attribute, value in fields.items():
        setattr(info, attribute, value)
    return info.tobuf(tarfile.PAX_FORMAT) + padded(content)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % BLOCK)


def checksummed(header: bytes) -> bytes:
    """The block with a checksum that is right again."""
    blank = header[:148] + b" " * 8 + header[156:]
    return header[:148] + b"%06o\0 " % sum(blank) + header[156:]


def with_size(header: bytes, text: bytes) -> bytes:
    return checksummed(header[:124] + text.ljust(12, b"\0") + header[136:])


def healthy(keys: Iterable[str] = KEYS) -> bytes:
    return Shard().samples(keys).closed()


def header_offsets(data: bytes) -> list[int]:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return [info.offset for info in tar]


def flipped(data: bytes, offset: int) -> bytes:
    return data[:offset] + bytes([data[offset] ^ 1]) + data[offset + 1 :]


def shards() -> list[Case]:
    """Shards that are damaged as files."""
    whole = healthy()
    heads = header_offsets(whole)
    body = whole[: -len(END)]
    half = heads[9]  # the image of the fourth sample
    after = KEYS[3:]
    page = b"<html><body><h1>403 Forbidden</h1></body></html>"
    one = member("a.jpg", b"x")
    cases = [
        Case("healthy", whole),
        Case("healthy, padded to 20 blocks", whole + bytes(10_240 - len(whole) % 10_240)),
        Case("zero bytes", b"", (), (), ("empty",)),
        Case("an end without members", END, (), (), ("empty",)),
        Case("a single zero block", bytes(BLOCK), (), (), ("empty",)),
        Case("only a folder", member("a", type=tarfile.DIRTYPE) + END, (), (), ("empty",)),
        Case("garbage", bytes(i * 7919 % 251 for i in range(5000)), (), (), ("not_a_tar",)),
        Case("short garbage", b"gone", (), (), ("not_a_tar",)),
        Case("an error page", page * 40, (), (), ("not_a_tar",)),
        Case("gzip under the name of a tar", gzip.compress(whole, mtime=0), (), (), ("not_a_tar",)),
        Case("one of two zero blocks at the end", body + bytes(BLOCK), KEYS, (), ("truncated",)),
        Case("no zero blocks at the end", body, KEYS, (), ("truncated",)),
        Case("cut inside an image", whole[: half + 700], KEYS[:3], [(KEYS[3], "damaged_member")], ("truncated",)),
        Case("cut inside a header", whole[: half + 100], KEYS[:3], (), ("truncated",)),
        Case("cut after an image", whole[: heads[10]], KEYS[:3], [(KEYS[3], "damaged_member")], ("truncated",)),
        Case("cut between samples", whole[:half], KEYS[:3], (), ("truncated",)),
        Case(
            "a flipped bit in the header of an image",
            flipped(whole, half + 5),
            [key for key in KEYS if key != KEYS[3]],
            [(KEYS[3], "damaged_member")],
            ("bad_header",),
        ),
        Case(
            "a flipped bit in the header of a text",
            flipped(whole, heads[10] + 130),
            [key for key in KEYS if key != KEYS[3]],
            [(KEYS[3], "damaged_member")],
            ("bad_header",),
        ),
        Case(
            "a flipped bit in the last header",
            flipped(whole, heads[-1] + 5),
            KEYS[:-1],
            [(KEYS[-1], "damaged_member")],
            ("bad_header",),
        ),
        Case("a flipped bit in an image", flipped(whole, half + BLOCK + 5)),
        Case("a zero block between samples", whole[:half] + bytes(BLOCK) + whole[half:], faults=("bad_header",)),
        Case("garbage between samples", whole[:half] + padded(page * 40) + whole[half:], faults=("bad_header",)),
        Case("two tars, one after the other", healthy(KEYS[:3]) + healthy(after), faults=("trailing_data",)),
        Case("garbage after the end", whole + page, faults=("trailing_data",)),
        Case(
            "garbage, then a tar, after the end",
            healthy(KEYS[:3]) + padded(page) + healthy(after),
            faults=("trailing_data",),
        ),
        Case(
            "a tar without end after the end",
            healthy(KEYS[:3]) + bytes(Shard().samples(after).data),
            faults=("trailing_data", "truncated"),
        ),
    ]
    for name, size in (
        ("a negative size in base-256", b"\xff" * 12),
        ("a negative size in text", b"-0000000001"),
        ("a size of 2^60", b"\x80" + (1 << 60).to_bytes(11, "big")),
        ("a size of letters", b"many"),
        ("a size over the limit for members", b"%011o" % ((1 << 30) + 1)),
    ):
        bad = with_size(one[:BLOCK], size) + one[BLOCK:]
        cases.append(Case(name, bad + whole, faults=("bad_header",)))
    return cases


def kinds() -> list[Case]:
    """Members of every kind, and names of every length; the tars themselves are sound."""
    first, rest = KEYS[0], KEYS[1:]
    long = "folder/" * 30 + "key"
    pax = {"path": "../../x.jpg"}
    cases = [
        Case(f"a {name}", Shard().add("__x__", type=kind, linkname=f"{first}.jpg").samples(KEYS).closed())
        for name, kind in (
            ("hard link", tarfile.LNKTYPE),
            ("symbolic link", tarfile.SYMTYPE),
            ("character device", tarfile.CHRTYPE),
            ("block device", tarfile.BLKTYPE),
            ("folder", tarfile.DIRTYPE),
            ("fifo", tarfile.FIFOTYPE),
        )
    ]
    sparse = bytearray(member("s.jpg", type=tarfile.GNUTYPE_SPARSE, size=BLOCK))
    sparse[482] = 1
    sparse_map = bytes(504) + b"\1" + bytes(7) + bytes(BLOCK)
    v7 = bytearray(member(f"{first}.jpg", b"picture"))
    v7[257:265] = bytes(8)
    old = (
        checksummed(bytes(v7[:BLOCK]))
        + v7[BLOCK:]
        + member(f"{first}.txt", b"caption")
        + member(f"{first}.json", b"{}")
    )
    cases += [
        Case(
            "an old GNU sparse file",
            checksummed(bytes(sparse)) + sparse_map + bytes(range(256)) * 2 + healthy(),
        ),
        Case(
            "a pax sparse file",
            Shard().add("GNUSparseFile.0/s.jpg", b"map", pax_headers={"GNU.sparse.major": "1"}).samples(KEYS).closed(),
        ),
        Case("an old header without magic", old + Shard().samples(rest).closed()),
        Case(
            "a checksum of signed bytes",
            signed(f"{first}.jpg") + Shard().samples(rest).closed(),
            rest,
            [(first, "missing_caption")],
        ),
        Case("names in pax headers", Shard().sample(long).closed(), [long]),
        Case("names beyond ASCII", Shard().sample("łąka/日本 1").closed(), ["łąka/日本 1"]),
        Case("names in GNU headers", gnu(long), [long]),
        Case("a name split into prefix and name", ustar("a" * 90 + "/" + "b" * 80), ["a" * 90 + "/" + "b" * 80]),
        Case("a global pax header", Shard().raw(pax_global(comment="x")).samples(KEYS).closed()),
        Case(
            "a pax header that overrides a safe name",
            Shard().add("safe.jpg", b"x", pax_headers=pax).samples(KEYS).closed(),
            KEYS,
            [(None, "unsafe_name")],
        ),
        Case(
            "a malformed pax header",
            Shard().raw(pax_block(b"99 path=q\n")).add("q.jpg", b"x").samples(KEYS).closed(),
            KEYS,
            [("q", "damaged_member")],
            ("bad_header",),
        ),
        Case(
            "a pax size that is no number",
            Shard().raw(pax_block(b"11 size=-1\n")).add("q.jpg", b"x").samples(KEYS).closed(),
            KEYS,
            [("q", "damaged_member")],
            ("bad_header",),
        ),
        Case(
            "a pax header over the limit",
            Shard().raw(pax_block(b"x" * ((1 << 20) + 1))).add("q.jpg", b"x").samples(KEYS).closed(),
            KEYS,
            [("q", "damaged_member")],
            ("bad_header",),
        ),
        Case(
            "10,000 empty members",
            Shard().raw(member("e.x") * 10_000).samples(KEYS).closed(),
            KEYS,
            [("e", "missing_image"), *[("e", "duplicate_key")] * 9_999],
        ),
    ]
    return cases


def names() -> list[Case]:
    """Names that must not go any further, beside healthy samples."""
    bad = {
        "that climbs": "../../etc/x",
        "that climbs in the middle": "a/../b",
        "that is absolute": "/abs",
        "with a drive letter": "C:/x",
        "with a backslash": "a\\b",
        "with a newline": "a\nb",
        "with a right-to-left override": "a\u202eb",
        "that is not UTF-8": "a\udcff",
        "of 100,000 characters": "k" * 100_000,
        "of nothing but a suffix": "folder/",
    }
    cases = []
    for name, key in bad.items():
        data = Shard().sample(KEYS[0]).sample(key).samples(KEYS[1:]).closed()
        cases.append(Case(f"a name {name}", data, KEYS, [(None, "unsafe_name")]))
    nul = Shard().sample(KEYS[0]).raw(pax_block(pax_record("path", "a\0b.jpg"))).add("x", b"x").samples(KEYS[1:])
    cases.append(Case("a name with a NUL", nul.closed(), KEYS, [(None, "unsafe_name")]))
    return cases


def samples() -> list[Case]:
    """Sound tars whose samples are odd."""
    a, b = KEYS[0], KEYS[1]
    of = parts(a)
    jpg, txt, meta = of["jpg"], of["txt"], of["json"]
    deep = b'{"caption": "x", "deep": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"

    def one(**members: bytes) -> bytes:
        shard = Shard()
        for suffix, content in members.items():
            shard.add(f"{a}.{suffix.replace('_', '.')}", content)
        return shard.sample(b).closed()

    def bad(name: str, problem: str, **members: bytes) -> Case:
        return Case(name, one(**members), [b], [(a, problem)])

    interleaved = Shard()
    for suffix in of:
        for key in KEYS:
            interleaved.add(f"{key}.{suffix}", parts(key)[suffix])
    return [
        Case("members not contiguous", interleaved.closed()),
        Case("two full copies", Shard().sample(a).sample(b).sample(a).closed(), [a, b], [(a, "duplicate_key")]),
        Case(
            "a repeated image", Shard().samples([a, b]).add(f"{a}.jpg", b"x").closed(), [a, b], [(a, "duplicate_key")]
        ),
        Case(
            "one key in two spellings",
            Shard().samples([a, f"./{a}", b]).closed(),
            [a, b],
            [(f"./{a}", "duplicate_key")],
        ),
        Case("a suffix repeated in capitals", one(jpg=jpg, txt=txt, JPG=jpg), [a, b], [(a, "duplicate_key")]),
        Case("suffixes in capitals", one(JPG=jpg, TXT=txt, JSON=meta), [a, b]),
        Case("a .jpeg", one(jpeg=jpg, txt=txt), [a, b]),
        Case("two images of one key", one(png=b"first", webp=b"second", txt=txt), [a, b]),
        Case("dotted suffixes beside the image", one(jpg=jpg, txt=txt, seg_png=b"mask", b_jpg=b"other"), [a, b]),
        Case("members of other kinds", one(jpg=jpg, txt=txt, cls=b"7", npy=b"\x93NUMPY", pkl=b"\x80\x04."), [a, b]),
        Case("caption only in the .json", one(jpg=jpg, json=meta), [a, b]),
        Case("caption under another name", one(jpg=jpg, json=b'{"TEXT": "words"}'), [a, b]),
        Case("a leading ./", Shard().sample("./x").closed(), ["./x"]),
        Case("no extension", Shard().sample(b).add("README", b"x").closed(), [b], [("README", "missing_image")]),
        bad("a dotted key", "missing_image", b_jpg=jpg, txt=txt),
        bad("no image", "missing_image", txt=txt, json=meta),
        bad("no caption", "missing_caption", jpg=jpg),
        bad("no caption in the .json", "missing_caption", jpg=jpg, json=b'{"caption": null}'),
        bad("an empty caption", "missing_caption", jpg=jpg, txt=b""),
        bad("a blank caption", "missing_caption", jpg=jpg, txt=b" \n\t", json=meta),
        bad("a caption that is not UTF-8", "bad_metadata", jpg=jpg, txt=b"caf\xe9", json=meta),
        bad("a caption of 10 MB", "bad_metadata", jpg=jpg, txt=b"x" * 10_000_000),
        Case("a caption with a NUL", one(jpg=jpg, txt=b"a\0b"), [a, b]),
        Case("a lone surrogate in the .json", one(jpg=jpg, json=rb'{"caption": "a\ud800b"}'), [a, b]),
        bad("a broken .json", "bad_metadata", jpg=jpg, txt=txt, json=b'{"caption": '),
        bad("a list for a .json", "bad_metadata", jpg=jpg, txt=txt, json=b"[1]"),
        bad("NaN in the .json", "bad_metadata", jpg=jpg, txt=txt, json=b'{"score": NaN}'),
        bad("a .json 100,000 deep", "bad_metadata", jpg=jpg, txt=txt, json=deep),
        bad("a number of 5,000 digits", "bad_metadata", jpg=jpg, txt=txt, json=b'{"n": ' + b"9" * 5000 + b"}"),
        bad("a .json of 2 MB", "bad_metadata", jpg=jpg, txt=txt, json=b'{"a": "' + b"x" * 2_000_000 + b'"}'),
        bad("broken .json and no caption", "bad_metadata", jpg=jpg, json=b"{"),
        bad("broken .json and no image", "missing_image", txt=txt, json=b"{"),
    ]


def everything() -> list[Case]:
    return [*shards(), *kinds(), *names(), *samples()]


def pax_block(records: bytes, kind: bytes = b"x") -> bytes:
    return member("PaxHeader", records, type=kind)


def pax_global(**records: str) -> bytes:
    body = b"".join(pax_record(key, value) for key, value in records.items())
    return pax_block(body, b"g")


def pax_record(key: str, value: str) -> bytes:
    text = f" {key}={value}\n".encode()
    length = len(text) + len(str(len(text) + 2))
    return b"%d" % length + text


def gnu(key: str) -> bytes:
    return _formatted(key, tarfile.GNU_FORMAT)


def ustar(key: str) -> bytes:
    return _formatted(key, tarfile.USTAR_FORMAT)


def _formatted(key: str, layout: int) -> bytes:
    out = b""
    for suffix, content in parts(key).items():
        info = tarfile.TarInfo(f"{key}.{suffix}")
        info.size = len(content)
        out += info.tobuf(layout) + padded(content)
    return out + END


def signed(name: str) -> bytes:
    """A member with bytes over 127 in its header, whose checksum summed them as negative, as some old tars did."""
    header = member(name, b"picture")
    blank = header[:148] + b" " * 8 + header[156:200] + b"\xe9" + header[201:BLOCK]
    total = sum(value - 256 * (value > 127) for value in blank)
    return blank[:148] + b"%06o\0 " % total + blank[156:] + header[BLOCK:]


@dataclass(frozen=True)
class OnDisk:
    """The files of one unit, already local: role -> path."""

    paths: dict[str, Path]
    damage: str | None = None

    def __contains__(self, role: str) -> bool:
        return role in self.paths

    def open(self, role: str) -> LocalFile:
        path = self.paths[role]
        stored = path.read_bytes()
        return LocalFile(str(path), len(stored), hashlib.sha256(stored).hexdigest(), self.damage)

    def read(self, role: str, ranges: Sequence[tuple[int, int]]) -> Iterator[bytes]:
        with open(self.paths[role], "rb") as file:
            for start, stop in ranges:
                file.seek(start)
                yield file.read(stop - start)
