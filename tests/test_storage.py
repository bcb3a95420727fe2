"""One contract for a folder, held to by a local one and by an object store (in memory)."""

from __future__ import annotations

import hashlib
import io
import uuid
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.storage import Root, redacted, scheme_of, sha256_of


@pytest.fixture(params=["local", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Root:
    return Root(str(tmp_path / "root") if request.param == "local" else f"memory://{uuid.uuid4().hex}/root")


def test_what_is_written_is_read_and_overwritten_whole(root: Root) -> None:
    root.write("a/b.bin", b"first, and longer")
    assert root.read("a/b.bin") == b"first, and longer"
    root.write("a/b.bin", b"second")
    assert root.read("a/b.bin") == b"second"
    root.write("a/c.bin", memoryview(b"xyz")[1:])
    assert root.read("a/c.bin") == b"yz"


def test_a_range_is_read_alone(root: Root) -> None:
    root.write("f", bytes(range(100)))
    assert root.read("f", 10, 20) == bytes(range(10, 20))
    assert root.read("f", 90) == bytes(range(90, 100))
    assert root.read("f", 95, 200) == bytes(range(95, 100))
    assert root.read("f", 5, 5) == b""


def test_an_open_file_can_seek_and_is_hashed_in_blocks(root: Root) -> None:
    root.write("f", b"abc" * 1000)
    with root.open("f") as file:
        assert sha256_of(file) == sha256_of(io.BytesIO(b"abc" * 1000))
        file.seek(2997)
        assert file.read() == b"abc"


def test_a_file_is_created_only_once(root: Root) -> None:
    assert root.create("receipts/x.json", b"first")
    assert not root.create("receipts/x.json", b"second")
    assert root.read("receipts/x.json") == b"first"


def test_every_file_below_a_folder_is_listed_in_order_with_its_length(root: Root) -> None:
    for path, data in {"b/2": b"22", "b/1/z": b"z", "a": b"", "b/1/a": b"aaa", "bb/3": b"3"}.items():
        root.write(path, data)
    assert list(root.list().items()) == [("a", 0), ("b/1/a", 3), ("b/1/z", 1), ("b/2", 2), ("bb/3", 1)]
    assert root.list("b") == {"b/1/a": 3, "b/1/z": 1, "b/2": 2}
    assert root.list("nothing") == {}


def test_a_file_that_is_not_there_has_no_length_and_cannot_be_read(root: Root) -> None:
    root.write("there", b"1234")
    assert root.bytes("there") == 4
    assert root.bytes("not") is None
    with pytest.raises(FileNotFoundError):
        root.read("not")
    with pytest.raises(FileNotFoundError):
        root.open("not")


def test_deleting_a_file_that_is_not_there_is_no_error(root: Root) -> None:
    root.write("a/f", b"1")
    root.delete("a/f")
    root.delete("a/f")
    assert root.bytes("a/f") is None
    assert root.list() == {}


def test_a_large_file_appears_when_it_is_whole(root: Root) -> None:
    with root.writing(lambda sha256: f"big/{sha256[:4]}") as file:
        file.write(b"part one, ")
        assert root.list() == {}
        file.write(b"part two")
    sha256 = hashlib.sha256(b"part one, part two").hexdigest()
    assert (file.sha256, file.bytes) == (sha256, 18)
    assert root.list() == {f"big/{sha256[:4]}": 18}
    assert root.read(f"big/{sha256[:4]}") == b"part one, part two"


def test_a_large_file_that_could_not_be_finished_leaves_nothing(root: Root) -> None:
    root.write("big/file", b"old")

    def fail() -> None:
        with root.writing(lambda _: "big/file") as file:
            file.write(b"half")
            raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"):
        fail()
    assert root.read("big/file") == b"old"
    assert root.list() == {"big/file": 3}
    folder = root.local("big")
    assert folder is None or [path.name for path in folder.iterdir()] == ["file"]


@pytest.mark.goal("R10")
def test_what_a_killed_process_left_half_written_is_swept_where_it_is_asked(tmp_path: Path) -> None:
    root = Root(str(tmp_path))
    for path in (".tmp-1", "ours/.tmp-2", "ours/deep/.tmp-3", "store/.tmp-4", "ours/kept"):
        root.write(path, b"half")
    root.sweep(("ours", "nowhere"))
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == [".tmp-4", "kept"]


def test_a_file_that_is_still_being_written_is_not_listed(tmp_path: Path) -> None:
    (tmp_path / ".tmp-0123").write_bytes(b"half")
    assert Root(str(tmp_path)).list() == {}


@pytest.mark.parametrize("url", ["pipe:ls", "data:text/plain,x", "ftp://host/x", "zip://a.zip::s3://b/c", "x::y"])
def test_other_schemes_are_refused(url: str) -> None:
    with pytest.raises(UserError, match="only these are read and written"):
        scheme_of(url)


def test_secrets_of_a_url_are_not_shown() -> None:
    assert redacted("https://me:secret@host/path?token=1#x") == "https://host/path"
    assert redacted("/a/local?path") == "/a/local?path"
