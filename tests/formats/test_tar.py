"""The tar reader against tarfile on sound archives, and against the truth of the corpus on damaged ones."""

from __future__ import annotations

import io
import tarfile
from dataclasses import dataclass, field

import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.formats.tar import BLOCK, END, Listing, member_header, padding, walk
from tests import corpus

CHARACTERS = st.characters(blacklist_categories=("Cs",), blacklist_characters="\0")
NAMES = st.text(CHARACTERS, min_size=1, max_size=300).filter(lambda name: not name.endswith("/"))  # tarfile strips it
CONTENTS = st.binary(max_size=1200)


def listing(data: bytes) -> Listing:
    return walk(io.BytesIO(data), len(data))


def found(data: bytes) -> list[tuple[str, bytes]]:
    return [(m.name, data[m.offset : m.offset + m.bytes]) for m in listing(data).members]


@dataclass
class Counting(io.BytesIO):
    """A file in memory that counts what is read."""

    data: bytes = b""
    total: int = field(default=0)

    def __post_init__(self) -> None:
        super().__init__(self.data)

    def read(self, count: int | None = -1, /) -> bytes:
        chunk = super().read(count)
        self.total += len(chunk)
        return chunk


@pytest.mark.parametrize("case", corpus.everything(), ids=lambda case: case.name)
def test_damage_is_reported_and_what_is_whole_is_found(case: corpus.Case) -> None:
    result = listing(case.data)
    assert [fault.reason for fault in result.faults] == list(case.faults)
    names = {member.name.partition(".")[0] for member in result.members if member.intact}
    assert {key for key in case.kept if "." not in key} <= names


def test_members_are_where_they_are_in_a_shard_written_by_hand() -> None:
    data = corpus.member("a.jpg", b"x" * 600) + corpus.member("a.txt", b"words") + END
    first, second = listing(data).members
    assert first == ("a.jpg", 0, 512, 600, True)
    assert second == ("a.txt", 512 + 1024, 512 + 1024 + 512, 5, True)


def test_a_long_name_begins_at_its_extended_header() -> None:
    data = corpus.member("a.x") + corpus.member("long/" * 40 + "a.jpg", b"x") + END
    second = listing(data).members[1]
    assert (second.header, data[second.offset : second.offset + 1]) == (512, b"x")


def test_links_folders_devices_and_sparse_files_are_counted() -> None:
    for case in corpus.kinds():
        skips = case.name.startswith(
            ("a hard", "a symb", "a char", "a block", "a folder", "a fifo", "an old GNU", "a pax sp")
        )
        assert listing(case.data).skipped == int(skips), case.name


@settings(deadline=None)
@given(
    st.lists(st.tuples(NAMES, CONTENTS), min_size=1, max_size=8),
    st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]),
)
def test_a_sound_tar_is_listed_as_tarfile_lists_it(members: list[tuple[str, bytes]], layout: int) -> None:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=layout) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    with tarfile.open(fileobj=io.BytesIO(stream.getvalue())) as tar:
        expected = [(info.name, info.offset_data, info.size) for info in tar]
    result = listing(stream.getvalue())
    assert [(m.name, m.offset, m.bytes) for m in result.members] == expected
    assert all(m.intact for m in result.members)
    assert result.faults == []


@given(st.data())
def test_damage_costs_only_the_members_whose_header_it_hits(data: st.DataObject) -> None:
    whole = corpus.healthy()
    before = listing(whole).members
    hurt = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(whole) - 1))
        junk = data.draw(st.one_of(st.binary(min_size=1, max_size=40), st.just(bytes(700))))[: len(whole) - start]
        hurt[start : start + len(junk)] = junk
    heads = {m.header: hurt[m.header : m.header + BLOCK] == whole[m.header : m.header + BLOCK] for m in before}
    result = listing(bytes(hurt))
    assert [m for m in before if heads[m.header]] == [m for m in result.members if heads.get(m.header)]
    assert bool(result.faults) == (not all(heads.values()) or hurt[-len(END) :] != END)


@given(st.binary(max_size=4000))
def test_no_bytes_raise(data: bytes) -> None:
    result = listing(data)
    assert result.faults
    assert all(0 <= fault.offset <= len(data) for fault in result.faults)


@given(st.integers(0, BLOCK - 1), st.binary(min_size=1, max_size=24), st.sampled_from([b"0", b"x", b"g", b"L", b"S"]))
def test_no_header_with_a_right_checksum_raises(at: int, junk: bytes, kind: bytes) -> None:
    header = bytearray(corpus.member("a.jpg", type=kind))
    header[at : at + len(junk)] = junk
    hostile = corpus.checksummed(bytes(header[:BLOCK]))
    result = listing(hostile + b"17 path=elsewhere\n".ljust(BLOCK, b"\0") + corpus.healthy())
    assert len(result.members) <= 3 * len(corpus.KEYS) + 1


def test_every_cut_keeps_what_is_whole_before_it() -> None:
    whole = corpus.healthy()
    members = listing(whole).members
    for cut in range(0, len(whole), 256):
        result = listing(whole[:cut])
        complete = [m for m in members if m.offset + m.bytes <= cut]
        assert [m for m in result.members if m.intact] == complete, cut
        started = [m.name for m in members if m.offset <= cut < m.offset + m.bytes]
        assert [m.name for m in result.members if not m.intact] == started, cut
        expected = "empty" if cut == 0 else "not_a_tar" if cut < BLOCK else "truncated"
        assert [fault.reason for fault in result.faults] == [expected], cut
        assert result.faults[0].offset == (cut if expected == "truncated" else 0)


def test_a_gap_is_one_fault_at_its_first_byte() -> None:
    whole = corpus.healthy()
    at = corpus.header_offsets(whole)[3]
    result = listing(whole[:at] + b"\x01" * 5000 + padding(5000) + whole[at:])
    assert [(fault.offset, fault.reason) for fault in result.faults] == [(at, "bad_header")]
    assert "5120 bytes on" in result.faults[0].detail


def test_a_cut_member_is_named_with_what_is_left_of_it() -> None:
    data = corpus.member("a.jpg", b"x" * 1000)[: 512 + 300]
    assert listing(data).faults[0].detail == "'a.jpg' is cut: 300 of 1000 bytes"


def test_a_member_whose_extended_header_is_broken_has_no_certain_name() -> None:
    data = corpus.pax_block(b"99 path=q\n") + corpus.member("q.jpg", b"x") + corpus.member("r.jpg", b"x") + END
    assert [(m.name, m.intact) for m in listing(data).members] == [("q.jpg", False), ("r.jpg", True)]


def test_a_second_archive_after_the_end_is_said_to_be_listed() -> None:
    first = corpus.healthy(corpus.KEYS[:1])
    fault = listing(first + corpus.healthy(corpus.KEYS[1:])).faults[0]
    assert (fault.offset, fault.reason) == (len(first), "trailing_data")
    assert "its members are listed too" in fault.detail


def test_a_damaged_last_header_does_not_hide_the_end() -> None:
    assert [f.reason for f in listing(corpus.member("a.x") + b"\x01" * BLOCK + END).faults] == ["bad_header"]
    assert [f.reason for f in listing(corpus.member("a.x") + b"\x01" * (BLOCK + 9)).faults] == [
        "bad_header",
        "truncated",
    ]


def test_data_is_never_read() -> None:
    file = Counting(corpus.member("a.jpg", b"x" * 9_000_000) + END)
    assert len(walk(file, len(file.data)).members) == 1
    assert file.total < 10_000


@pytest.mark.parametrize("junk", [b"\x01" * BLOCK, END + b"\x01" * BLOCK, bytes(BLOCK)])
def test_alternating_damage_is_read_in_linear_time(junk: bytes) -> None:
    file = Counting((corpus.member("a.x") + junk) * 1000)
    assert len(walk(file, len(file.data)).members) == 1000
    assert file.total < 12 * len(file.data)


def test_garbage_is_read_once() -> None:
    file = Counting(bytes(range(1, 252)) * 40_000)
    assert [fault.reason for fault in walk(file, len(file.data)).faults] == ["not_a_tar"]
    assert file.total < 1.01 * len(file.data)


@settings(deadline=None)
@given(st.lists(st.tuples(NAMES, CONTENTS), min_size=1, max_size=6), st.integers(0, 2**32))
def test_what_we_write_is_read_back_by_us_and_by_tarfile(members: list[tuple[str, bytes]], mtime: int) -> None:
    data = b"".join(member_header(name, len(body), mtime) + body + padding(len(body)) for name, body in members) + END
    assert listing(data).faults == []
    assert found(data) == members
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        assert [info.name for info in tar.getmembers()] == [name for name, _ in members]
        assert {info.mtime for info in tar.getmembers()} == {mtime}


def test_what_we_write_is_read_back_by_webdataset() -> None:
    members = {"a.jpg": b"picture", "a.txt": b"words", "folder/" * 20 + "b.jpg": b"other"}
    data = b"".join(member_header(n, len(b)) + b + padding(len(b)) for n, b in members.items()) + END
    files = webdataset.tariterators.tar_file_expander([{"url": "", "stream": io.BytesIO(data)}])
    first, second = webdataset.tariterators.group_by_keys(files)
    assert (first["__key__"], first["jpg"], first["txt"]) == ("a", b"picture", b"words")
    assert (second["__key__"], second["jpg"]) == ("folder/" * 20 + "b", b"other")


def test_a_short_header_is_the_one_that_tarfile_writes() -> None:
    info = tarfile.TarInfo("000.jpg")
    info.size = 1234
    assert member_header("000.jpg", 1234) == info.tobuf(tarfile.USTAR_FORMAT)


@pytest.mark.parametrize("count", [8**11 - 1, 8**11, 1 << 50])
def test_sizes_of_many_gigabytes_are_written(count: int) -> None:
    assert tarfile.TarInfo.frombuf(member_header("big", count), "utf-8", "strict").size == count


@pytest.mark.parametrize("length", [95, 99, 100, 101, 980, 990, 9970, 9990])
def test_pax_records_state_their_own_length(length: int) -> None:
    name = "n" * length
    assert found(member_header(name, 1) + b"x" + padding(1) + END) == [(name, b"x")]
