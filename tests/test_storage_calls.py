"""Single calls of storage: which errors pass, what they say, whose turn it is, and what outlives a power cut."""

from __future__ import annotations

import errno
import gzip
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
from botocore.exceptions import ClientError, EndpointConnectionError, NoCredentialsError

from pipeline.machine import Machine
from pipeline.stage import Source, Unit
from pipeline.storage import REQUESTS_PER_S, Root, UnitFiles, is_passing, persistently
from tests.faulty import FaultyMemory, Plan, faulty_memory
from tests.pools import unit_of


@pytest.fixture
def memory() -> Iterator[type[FaultyMemory]]:
    with faulty_memory() as memory:
        yield memory


def failing_once(error: Exception) -> tuple[Callable[[], str], list[int]]:
    tries: list[int] = []

    def call() -> str:
        tries.append(1)
        if len(tries) == 1:
            raise error
        return "done"

    return call, tries


@pytest.mark.parametrize(
    "error",
    [
        ConnectionResetError(),
        TimeoutError(),
        OSError(errno.EBUSY, "Please reduce your request rate."),
        OSError(errno.EREMOTEIO, "We encountered an internal error. Please try again."),
        OSError("ServiceUnavailable"),
        OSError(errno.EIO, "An error occurred (503) when calling PutObject"),
        EndpointConnectionError(endpoint_url="https://example.org"),
        ClientError({"Error": {"Code": "SlowDown", "Message": "less"}}, "PutObject"),
    ],
)
def test_an_error_that_passes_is_tried_again(error: Exception) -> None:
    call, tries = failing_once(error)
    assert persistently(call, "s3://bucket/a") == "done"
    assert len(tries) == 2


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError("a"),
        FileExistsError("a"),
        PermissionError("Access Denied"),
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EINVAL, "sent 5030 bytes"),
        NoCredentialsError(),
        ValueError("503"),
        FileNotFoundError("bucket/503/SlowDown.tar"),
        PermissionError("Access Denied: Timeout"),
    ],
)
def test_an_error_that_stays_is_raised_at_once(error: Exception) -> None:
    call, tries = failing_once(error)
    assert not is_passing(error)
    with pytest.raises((OSError, ValueError)):
        persistently(call, "s3://bucket/a")
    assert len(tries) == 1


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (
            PermissionError("Access Denied"),
            PermissionError,
            "s3://bucket/a: access refused (not throttling): Access Denied",
        ),
        (OSError(28, "No space left"), OSError, "[Errno 28] No space left: 's3://bucket/a'"),
        (FileNotFoundError("No such bucket"), FileNotFoundError, "s3://bucket/a: No such bucket"),
        (NoCredentialsError(), OSError, "s3://bucket/a: NoCredentialsError: Unable to locate credentials"),
    ],
)
def test_an_error_names_the_object_and_no_secret(error: Exception, kind: type[OSError], message: str) -> None:
    call, _ = failing_once(error)
    with pytest.raises(kind) as raised:
        persistently(call, "s3://me:secret@bucket/a?token=x")
    assert str(raised.value) == message


def test_requests_to_one_prefix_wait_their_turn_and_others_do_not() -> None:
    def seconds(where: str, calls: int) -> float:
        began = time.monotonic()
        for _ in range(calls):
            persistently(lambda: None, where)
        return time.monotonic() - began

    assert seconds("s3://turns/one/a", REQUESTS_PER_S + REQUESTS_PER_S // 4) > 0.2
    assert min(seconds(f"s3://turns/other{n}/a", 10) for n in range(5)) < 0.1


def test_a_short_read_is_not_taken_for_the_end_of_a_file(memory: type[FaultyMemory]) -> None:
    root = Root("memory://root")
    root.write("f", bytes(range(100)))
    for start, stop in ((None, None), (10, 20), (90, 200)):
        memory.plan = Plan("cat_file", "short read", 1)
        assert root.read("f", start, stop) == bytes(range(100))[start:stop]
        assert memory.plan.done and len(memory.plan.seen["cat_file"]) == 2


@pytest.mark.parametrize(("fault", "is_tagged"), [("short read", True), ("short read", False), ("flipped bit", True)])
def test_a_file_of_the_pool_that_arrives_otherwise_than_the_store_tells_is_fetched_again(
    memory: type[FaultyMemory], fault: str, is_tagged: bool
) -> None:
    root = Root("memory://pool")
    root.write("a.tar", b"x" * 1000)
    etag = memory().info("/pool/a.tar")["ETag"].strip('"') if is_tagged else ""
    unit = Unit("a.tar", {"tar": Source("memory://pool/a.tar", 1000, etag)})
    memory.plan = Plan("get_file", fault, 1)
    with UnitFiles(unit, Machine()) as files:
        assert Path(files.open("tar").path).read_bytes() == b"x" * 1000
    assert memory.plan.done


def test_what_is_decompressed_is_another_file_than_the_same_bytes_as_they_are(tmp_path: Path) -> None:
    digests = []
    for name in ("0.tar", "0.tar.gz", "1.tar.gz"):
        (tmp_path / name).write_bytes(gzip.compress(b"x" * 1000, mtime=0))
        with UnitFiles(unit_of(tar=tmp_path / name), Machine(), hashing=True) as files:
            digests.append(files.open("tar").sha256)
    assert digests[1] == digests[2] == f"gunzip {digests[0]}"


@pytest.mark.parametrize(
    ("change", "lost", "damage"),
    [
        (lambda data: data, 0, None),
        (lambda data: data[:-8], 0, "ended before"),
        (lambda data: data[:-400], 600, "ended before"),
        (lambda data: data + b"x", 0, "Not a gzipped file"),
        (lambda data: data[:50_000] + bytes(8) + data[50_008:], 60_000, ""),
    ],
)
def test_a_gz_is_decompressed_as_far_as_the_bytes_allow(
    tmp_path: Path, change: Callable[[bytes], bytes], lost: int, damage: str | None
) -> None:
    plain = np.random.default_rng(0).bytes(100_000)
    (tmp_path / "0.tar.gz").write_bytes(change(gzip.compress(plain, mtime=0)))
    with UnitFiles(unit_of(tar=tmp_path / "0.tar.gz"), Machine()) as files:
        found = files.open("tar")
        data = Path(found.path).read_bytes()
    assert len(data) == found.bytes >= len(plain) - lost
    assert data[:40_000] == plain[:40_000]
    assert (found.damage is None) == (damage is None) and (damage or "") in (found.damage or "")


def test_an_etag_that_is_no_md5_is_believed_when_two_fetches_agree(memory: type[FaultyMemory]) -> None:
    Root("memory://pool").write("a.tar", b"x" * 1000)
    memory.etag = "0" * 32
    try:
        unit = Unit("a.tar", {"tar": Source("memory://pool/a.tar", 1000, "0" * 32)})
        with UnitFiles(unit, Machine()) as files:
            assert files.open("tar").bytes == 1000
        Root("memory://root").write("encrypted", b"y" * 10)
    finally:
        memory.etag = ""
    assert Root("memory://root").read("encrypted") == b"y" * 10


@pytest.mark.parametrize(("fault", "etag"), [("flipped bit", ""), ("short write", ""), ("short write", "no digest")])
@pytest.mark.parametrize("operation", ["pipe_file", "put_file"])
def test_what_was_written_otherwise_is_written_again(
    memory: type[FaultyMemory], operation: str, fault: str, etag: str
) -> None:
    root = Root("memory://root")
    memory.plan, memory.etag = Plan(operation, fault, 1), etag
    try:
        if operation == "pipe_file":
            root.write("f", b"abc" * 100)
        else:
            with root.writing(lambda _: "f") as file:
                file.write(b"abc" * 100)
    finally:
        memory.etag = ""
    assert memory.plan.done and root.read("f") == b"abc" * 100


@pytest.mark.parametrize("fault", ["short write", "torn write", "flipped bit", "lost acknowledgement", "done twice"])
def test_what_was_created_counts_when_it_arrived_whole(memory: type[FaultyMemory], fault: str) -> None:
    memory.plan = Plan("pipe_file", fault, 1)
    root = Root("memory://root")
    arrived = fault in ("lost acknowledgement", "done twice")
    assert root.create("f", b"abc" * 100) == arrived
    assert (root.read("f") == b"abc" * 100) == arrived


def calls_of(do: Callable[[], Any]) -> list[str]:
    """Names of the calls that make a file lasting, in order."""
    made: list[str] = []
    lasting = {os.fsync: "fsync", os.replace: "replace", os.link: "link", os.mkdir: "mkdir"}

    def profile(frame: FrameType, event: str, function: Any) -> None:
        if event == "c_call" and getattr(function, "__module__", "") == "posix" and function in lasting:
            made.append(lasting[function])

    sys.setprofile(profile)
    try:
        do()
    finally:
        sys.setprofile(None)
    return made


def test_a_file_is_on_disk_before_it_has_its_name_and_its_name_before_anything_follows(tmp_path: Path) -> None:
    root = Root(str(tmp_path))

    def built() -> None:
        with root.writing(lambda _: "large") as file:
            file.write(b"1")

    assert calls_of(lambda: root.write("f", b"1")) == ["fsync", "replace", "fsync"]
    assert calls_of(lambda: root.create("g", b"1")) == ["fsync", "link", "fsync"]
    assert calls_of(built) == ["fsync", "replace", "fsync"]
    assert calls_of(lambda: root.write("a/b/f", b"1")) == [*["mkdir", "fsync"] * 2, "fsync", "replace", "fsync"]
