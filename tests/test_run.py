"""The commit protocol: what is committed once is found again, and nothing else is ever read."""

from __future__ import annotations

import io
import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Barrier

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given as cases
from hypothesis import settings
from hypothesis import strategies as st

from jobs.curate import executor_of
from pipeline.errors import RunError, SchemaError, UserError
from pipeline.executor import Serial
from pipeline.machine import Machine
from pipeline.parts import (
    FETCH_BYTES,
    FETCHES,
    INDEX,
    PACKED,
    Bucket,
    Committed,
    DamagedPart,
    Dataset,
    File,
    Listed,
    Part,
    StoredRows,
    Texts,
    _Entry,
    _together,
    canonical,
    digest,
    part_path,
    to_parquet,
    to_shuffle,
)
from pipeline.run import RECEIPT_BATCH, RECEIPTS, Quiet, Receipts, Run, commit, in_order, sealed, stage_key, unsealed
from pipeline.stage import Made, Source, Unit
from pipeline.storage import Root
from tests.toy_stages import Guess, Liar, Lines, Print, Scatter, Slow, Sum, Times


def unit(path: Path, numbers: Sequence[int]) -> Unit:
    """A shard of numbers; one that is there already stays the same file."""
    text = "".join(f"{number}\n" for number in numbers)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text() != text:
        path.write_text(text)
    return Unit(path.name, {"text": Source(str(path), len(text), str(path.stat().st_mtime_ns))})


def pool(folder: Path, shards: int) -> list[Unit]:
    """Shard i holds 10 i + 1, 10 i + 2, 10 i + 3."""
    return [unit(folder / f"{i:03d}.txt", [10 * i + 1, 10 * i + 2, 10 * i + 3]) for i in range(shards)]


@pytest.fixture(params=["local", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Root:
    return Root(str(tmp_path / "store") if request.param == "local" else f"memory://{uuid.uuid4().hex}")


def run_of(store: Root, tmp_path: Path, segment_parts: int = 4096) -> Run:
    """A run in a new process, as far as that can be told."""
    machine = Machine(scratch=str(tmp_path))
    return Run(store, Root(str(tmp_path / "run")), Serial(), machine, segment_parts=segment_parts)


def products(run: Run, dataset: Dataset) -> list[list[int]]:
    return [run.rows(part).table().column(0).to_pylist() for part in dataset.parts]


def made(run: Run) -> list[tuple[str, int]]:
    return [(entry["stage"], entry["parts"]) for entry in run.times]


@pytest.mark.goal("R18")
def test_a_part_is_made_once_and_found_again(store: Root, tmp_path: Path) -> None:
    units = pool(tmp_path / "pool", 3)
    first = run_of(store, tmp_path)
    numbers = first.read(Lines(), units)["numbers"]
    doubled = first.map(Times(2), numbers)["products"]
    assert products(first, doubled) == [[2, 4, 6], [22, 24, 26], [42, 44, 46]]
    assert made(first) == [("lines", 3), ("times", 3)]

    there = store.list()
    again = run_of(store, tmp_path)
    assert again.map(Times(2), again.read(Lines(), units)["numbers"])["products"] == doubled
    assert made(again) == []
    assert store.list() == there


@dataclass
class Remarks(Quiet):
    """Remembers what it was told."""

    remarks: list[str] = field(default_factory=list)

    def remark(self, text: str) -> None:
        self.remarks.append(text)


@pytest.mark.parametrize("kind", ["serial", pytest.param("ray", marks=pytest.mark.ray)])
def test_times_tell_what_workers_held_and_the_progress_what_bounds_them(kind: str, tmp_path: Path) -> None:
    machine = Machine(threads=1, workers=1, decoders=2)
    progress = Remarks()
    executor = executor_of(kind, machine)
    try:
        root = Root(str(tmp_path / "run"))
        run = Run(Root(str(tmp_path / "store")), root, executor, machine, progress)
        numbers = run.read(Lines(), pool(tmp_path / "pool", 3))["numbers"]
        run.map(Times(2), numbers)
        assert progress.remarks == []
        run.numerics_class = {"device": "cuda"}
        run.map(Slow(2), numbers, gpu=True)
    finally:
        executor.close()
    said = "bound by forward passes; more cores to decode would not help, one more worker would make it 2 times as fast"
    assert progress.remarks == [said] * 3
    _, plain, slow = run.times
    assert [entry["workers"] for entry in run.times] == [1, 1, 1]
    assert "phases" not in plain
    assert plain["gpu_hours"] == 0
    rounding_s = 1e-3  # `seconds` have three decimals
    assert 0 < plain["core_hours"] <= (plain["seconds"] + rounding_s) / 3600  # of one thread
    write_s = slow["phases"].pop("write")
    assert slow["phases"] == {"read": 3, "decode": 27, "image": 12, "text": 3}
    assert 0 < write_s < slow["seconds"] + rounding_s
    assert slow["core_hours"] == pytest.approx(3 * slow["gpu_hours"])  # its thread and two decoders
    assert 0 < slow["gpu_hours"] <= (slow["seconds"] + rounding_s) / 3600


def test_what_a_task_took_enters_no_record(tmp_path: Path) -> None:
    stores = []
    for at in range(2):
        store = Root(str(tmp_path / f"store{at}"))
        run = run_of(store, tmp_path / str(at))
        run.map(Slow(2), run.read(Lines(), pool(tmp_path / "pool", 3))["numbers"])
        stores.append({path: store.read(path) for path in store.list() if not path.startswith("listed/")})
    assert stores[0] == stores[1]
    assert not any(b"decode" in data for data in stores[0].values())


def test_a_second_run_reads_no_shard(store: Root, tmp_path: Path) -> None:
    units = pool(tmp_path / "pool", 3)
    numbers = run_of(store, tmp_path).read(Lines(), units)["numbers"]
    for shard in (tmp_path / "pool").iterdir():
        shard.unlink()
    assert run_of(store, tmp_path).read(Lines(), units)["numbers"] == numbers


@pytest.mark.goal("R18")
def test_a_moved_pool_is_hashed_once_and_recognised(store: Root, tmp_path: Path) -> None:
    numbers = run_of(store, tmp_path).read(Lines(), pool(tmp_path / "pool", 3))["numbers"]
    parts = store.list("parts")
    moved = run_of(store, tmp_path)
    assert moved.read(Lines(), pool(tmp_path / "elsewhere", 3))["numbers"] == numbers
    assert store.list("parts") == parts
    again = run_of(store, tmp_path)
    again.read(Lines(), pool(tmp_path / "elsewhere", 3))
    assert made(again) == []


@pytest.mark.goal("R18")
def test_a_changed_parameter_makes_all_parts_anew(store: Root, tmp_path: Path) -> None:
    units = pool(tmp_path / "pool", 3)
    first = run_of(store, tmp_path)
    doubled = first.map(Times(2), first.read(Lines(), units)["numbers"])["products"]
    second = run_of(store, tmp_path)
    tripled = second.map(Times(3), second.read(Lines(), units)["numbers"])["products"]
    assert made(second) == [("times", 3)]
    assert products(second, tripled)[0] == [3, 6, 9]
    assert doubled.key != tripled.key


@pytest.mark.goal("R18")
def test_where_a_file_lies_is_no_parameter(store: Root, tmp_path: Path) -> None:
    assert stage_key(Times(2, "here")) == stage_key(Times(2, "there"))
    assert stage_key(Times(2, "here")) != stage_key(Times(2, "here").__class__(3, "here"))
    assert stage_key(Times(2)) != stage_key(Guess(2)), "two stages with the same fields share nothing"


@pytest.mark.goal("R18")
def test_a_grown_pool_makes_only_the_new_parts(store: Root, tmp_path: Path) -> None:
    first = run_of(store, tmp_path)
    first.map(Times(2), first.read(Lines(), pool(tmp_path / "pool", 3))["numbers"])
    units = pool(tmp_path / "pool", 5)
    grown = run_of(store, tmp_path)
    doubled = grown.map(Times(2), grown.read(Lines(), [units[4], *units[:4]])["numbers"])["products"]
    assert made(grown) == [("lines", 2), ("times", 2)]
    assert products(grown, doubled)[0] == [82, 84, 86]
    assert len(doubled) == 5


@pytest.mark.goal("R18")
def test_a_changed_shard_is_made_anew(store: Root, tmp_path: Path) -> None:
    units = pool(tmp_path / "pool", 3)
    run_of(store, tmp_path).read(Lines(), units)
    changed = run_of(store, tmp_path)
    units[1] = unit(tmp_path / "pool" / "001.txt", [91, 92, 93])
    assert products(changed, changed.read(Lines(), units)["numbers"])[1] == [91, 92, 93]
    assert made(changed) == [("lines", 1)]


def test_shards_with_the_same_content_are_each_a_part(store: Root, tmp_path: Path) -> None:
    units = [unit(tmp_path / "pool" / f"{i}.txt", [7, 8]) for i in range(3)]
    for _ in range(2):
        run = run_of(store, tmp_path)
        assert products(run, run.read(Lines(), units)["numbers"]) == [[7, 8]] * 3


def test_several_stages_make_what_each_of_them_misses(store: Root, tmp_path: Path) -> None:
    units = pool(tmp_path / "pool", 3)
    first = run_of(store, tmp_path)
    first.map(Times(2), first.read(Lines(), units[:2])["numbers"])
    both = run_of(store, tmp_path)
    numbers = both.read(Lines(), units)["numbers"]
    doubled, tripled = both.map(Times(2), numbers)["products"], both.map(Times(3), numbers)["products"]
    assert made(both)[1:] == [("times", 1), ("times", 3)]
    assert [products(both, d)[2] for d in (doubled, tripled)] == [[42, 44, 46], [63, 66, 69]]


def test_a_racing_attempt_with_other_bytes_is_an_alarm_where_the_stage_is_exact(store: Root, tmp_path: Path) -> None:
    directory = Root(str(tmp_path / "run"))
    mine, other = (Made({"products": pa.table({"product": [n]})}) for n in (1, 2))
    first = commit(store, directory, Times(2), "a" * 32, "000.txt", mine, None)
    assert commit(store, directory, Times(2), "a" * 32, "000.txt", mine, None) == first
    with pytest.raises(RunError, match=r"times: two attempts at 000.txt gave different bytes, though .* exact"):
        commit(store, directory, Times(2), "a" * 32, "000.txt", other, None)
    assert commit(store, directory, Times(2), "a" * 32, "000.txt", mine, None) == first


def test_a_racing_attempt_that_may_differ_discards_its_bytes(store: Root, tmp_path: Path) -> None:
    directory = Root(str(tmp_path / "run"))
    mine, other = (Made({"products": pa.table({"product": [n]})}) for n in (1, 2))
    first = commit(store, directory, Guess(2), "a" * 32, "000.txt", mine, None)
    assert commit(store, directory, Guess(2), "a" * 32, "000.txt", other, None) == first
    assert list(store.list("parts")) == [first["files"]["products"]["path"]]


def test_a_racing_export_with_other_bytes_is_an_alarm(store: Root, tmp_path: Path) -> None:
    directory = Root(str(tmp_path / "run"))
    mine, other = (Made({}, exports={"f": lambda out, n=n: out.write(n.encode())}) for n in "12")
    commit(store, directory, Print(), "a" * 32, "000.txt", mine, None)
    with pytest.raises(RunError, match=r"two attempts at 000.txt wrote different bytes"):
        commit(store, directory, Print(), "a" * 32, "000.txt", other, None)


@pytest.mark.goal("R10")
def test_files_that_nobody_committed_are_not_read(store: Root, tmp_path: Path) -> None:
    units = pool(tmp_path / "pool", 3)
    first = run_of(store, tmp_path)
    numbers = first.read(Lines(), units)["numbers"]
    doubled = first.map(Times(2), numbers)["products"]
    for path in (
        "parts/times/aa/" + "a" * 32 + "-products-0123456789abcdef",
        "receipts/times/aa/" + "a" * 32 + ".json",
        "receipts/times/torn.json",
        "manifests/times/torn.parquet",
        "segments/times/torn.parquet",
        "stray",
    ):
        store.write(path, b"garbage")
    again = run_of(store, tmp_path)
    assert again.map(Times(2), numbers)["products"] == doubled
    assert again.map(Times(3), numbers)["products"].num_rows == 9
    assert made(again) == [("times", 3)]


@pytest.mark.parametrize("damage", [b"", b"garbage", b"flip"])
def test_damaged_records_count_as_none_and_what_they_stood_for_is_found_or_made_again(
    tmp_path: Path, damage: bytes
) -> None:
    store = Root(str(tmp_path / "store"))
    units = pool(tmp_path / "pool", 5)
    first = run_of(store, tmp_path, segment_parts=2)
    doubled = first.map(Times(2), first.read(Lines(), units)["numbers"])["products"]
    whole = {path: store.read(path) for path in store.list()}
    for folders in (("manifests",), ("listed",), ("manifests", "receipts"), ("manifests", "segments", "receipts")):
        for path, data in whole.items():
            middle = len(data) // 2
            flipped = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
            if path.startswith(folders):
                store.write(path, flipped if damage == b"flip" else damage)
        again = run_of(store, tmp_path, segment_parts=2)
        assert again.map(Times(2), again.read(Lines(), units)["numbers"])["products"] == doubled
        assert {path: data for path, data in whole.items() if path.startswith("parts")} == {
            path: store.read(path) for path in store.list("parts")
        }
        for path, data in whole.items():
            store.write(path, data)


@pytest.mark.goal("R10")
def test_a_part_without_its_receipt_is_made_anew(store: Root, tmp_path: Path) -> None:
    units = pool(tmp_path / "pool", 3)
    first = run_of(store, tmp_path)
    numbers = first.read(Lines(), units)["numbers"]
    doubled = first.map(Times(2), numbers)["products"]
    for path in [*store.list("manifests/times"), list(store.list("receipts/times"))[1]]:
        store.delete(path)
    again = run_of(store, tmp_path)
    assert again.map(Times(2), numbers)["products"] == doubled
    assert made(again) == [("times", 1)]


def test_a_flipped_byte_in_a_part_is_named(store: Root, tmp_path: Path) -> None:
    run = run_of(store, tmp_path)
    numbers = run.read(Lines(), pool(tmp_path / "pool", 3))["numbers"]
    path = numbers.parts[1].files[0].path
    data = bytearray(store.read(path))
    data[len(data) // 2] ^= 1
    store.write(path, bytes(data))
    with pytest.raises(DamagedPart, match=f"{path}: its bytes do not match the digest in its receipt"):
        run.rows(numbers.parts[1]).table()
    with pytest.raises(RunError, match=rf"times: 1 of its parts could not be made; .*\n  001.txt: DamagedPart: {path}"):
        run.map(Times(2), numbers)

    for folder in ("manifests/lines", "segments/lines", "receipts/lines"):  # as the message says
        for path in store.list(folder):
            store.delete(path)
    again = run_of(store, tmp_path)
    assert products(again, again.map(Times(2), again.read(Lines(), pool(tmp_path / "pool", 3))["numbers"])["products"])


def test_a_flipped_byte_in_a_shuffle_is_named_by_the_bucket_that_reads_it(store: Root, tmp_path: Path) -> None:
    run = run_of(store, tmp_path)
    numbers = run.read(Lines(), pool(tmp_path / "pool", 1))["numbers"]
    rows = run.map(Scatter(3), numbers)["rows"].shuffled(3)
    path = rows.parts[0].files[0].path
    data = bytearray(store.read(path))
    data[100] ^= 1  # in the rows of the first bucket
    store.write(path, bytes(data))
    with pytest.raises(DamagedPart, match=path):
        run.rows(rows.parts[0]).table()
    assert run.rows(rows.parts[1]).table().column("number").to_pylist() == [1]
    data[100] ^= 1
    for offset in (0, 8, 16):  # of where the second bucket's rows are said to lie, their length and their digest
        damaged = bytearray(data)
        damaged[offset - 2 * INDEX.itemsize : offset - 2 * INDEX.itemsize + 8] = bytes(8)
        store.write(path, bytes(damaged))
        with pytest.raises(DamagedPart, match=path):
            run.rows(rows.parts[1]).table()


def test_a_failed_unit_is_named_the_others_are_committed_and_a_rerun_makes_only_that_one(
    store: Root, tmp_path: Path
) -> None:
    (tmp_path / "down-11").touch()
    first = run_of(store, tmp_path)
    numbers = first.read(Lines(), pool(tmp_path / "pool", 4))["numbers"]
    with pytest.raises(RunError) as error:
        first.map(Times(2), numbers)
    assert str(error.value) == (
        "times: 1 of its parts could not be made; the others are committed, a rerun tries only these\n"
        "  001.txt: OSError: the disk is full"
    )
    assert made(first)[-1] == ("times", 3)
    assert store.read("failed/times.json") == b'[{"cause":"OSError: the disk is full","name":"001.txt"}]'
    assert not store.list("manifests/times")

    (tmp_path / "down-11").unlink()
    again = run_of(store, tmp_path)
    doubled = again.map(Times(2), numbers)["products"]
    assert made(again) == [("times", 1)]
    assert products(again, doubled)[1] == [22, 24, 26]
    assert not store.list("failed")


def test_a_mistake_of_the_user_is_told_as_such(store: Root, tmp_path: Path) -> None:
    (tmp_path / "wrong-11").touch()
    (tmp_path / "down-1").touch()
    run = run_of(store, tmp_path)
    numbers = run.read(Lines(), pool(tmp_path / "pool", 3))["numbers"]
    with pytest.raises(UserError, match=r"recipe.factor: this number cannot be multiplied"):
        run.map(Times(2), numbers)


def test_many_failures_are_counted_and_the_first_twenty_named(tmp_path: Path) -> None:
    run = run_of(Root(str(tmp_path / "store")), tmp_path)
    numbers = run.read(Lines(), pool(tmp_path / "pool", 23))["numbers"]
    for i in range(23):
        (tmp_path / f"down-{10 * i + 1}").touch()
    with pytest.raises(RunError, match=r"(?s)23 of its parts .*  019.txt: .*  and 3 more$"):
        run.map(Times(2), numbers)


def test_a_stage_that_breaks_its_promise_commits_nothing(store: Root, tmp_path: Path) -> None:
    with pytest.raises(SchemaError, match=r"liar: made \['other'\], declares \['sums'\]"):
        commit(store, Root(str(tmp_path)), Liar(), "a" * 32, "x", Made({"other": pa.table({"sum": [0]})}), None)
    run = run_of(store, tmp_path)
    with pytest.raises(RunError, match="SchemaError: liar: made"):
        run.map(Liar(), run.read(Lines(), pool(tmp_path / "pool", 1))["numbers"])
    assert not store.list("receipts/liar")


def test_inputs_of_different_lengths_are_refused(tmp_path: Path) -> None:
    run = run_of(Root(str(tmp_path / "store")), tmp_path)
    numbers = run.read(Lines(), pool(tmp_path / "pool", 3))["numbers"]
    with pytest.raises(ValueError, match="is shorter than"):
        run.map(Sum(), numbers, numbers.grouped(2))


def test_a_fit_over_all_parts_is_kept_until_one_of_them_changes(store: Root, tmp_path: Path) -> None:
    units = pool(tmp_path / "pool", 4)
    run = run_of(store, tmp_path)
    numbers = run.read(Lines(), units)["numbers"]
    assert products(run, run.map(Sum(), numbers.grouped(4))["sums"]) == [[1 + 2 + 3 + 11 + 12 + 13 + 66 + 96]]
    assert products(run, run.map(Sum(), numbers.grouped(3))["sums"]) == [[42 + 66], [96]]
    before = len(made(run))
    run.map(Sum(), numbers.grouped(4))
    assert len(made(run)) == before
    units[3] = unit(tmp_path / "pool" / "003.txt", [0])
    assert products(run, run.map(Sum(), run.read(Lines(), units)["numbers"].grouped(4))["sums"]) == [[108]]


def test_receipts_are_compacted_and_found_again(store: Root, tmp_path: Path) -> None:
    (tmp_path / "down-111").touch()
    first = run_of(store, tmp_path, segment_parts=5)
    numbers = first.read(Lines(), pool(tmp_path / "pool", 12))["numbers"]
    with pytest.raises(RunError, match="1 of its parts"):
        first.map(Times(2), numbers)
    assert len(store.list("segments/times")) == 2
    assert len(store.list("receipts/times")) == 1
    assert not store.list("manifests/times")

    (tmp_path / "down-111").unlink()
    again = run_of(store, tmp_path, segment_parts=5)
    doubled = again.map(Times(2), numbers)["products"]
    assert made(again) == [("times", 1)]
    assert products(again, doubled) == [[20 * i + 2, 20 * i + 4, 20 * i + 6] for i in range(12)]

    for path in store.list("manifests/times"):
        store.delete(path)
    last = run_of(store, tmp_path)
    assert last.map(Times(2), numbers)["products"] == doubled
    assert made(last) == []


def test_a_file_of_the_run_directory_that_is_gone_or_cut_is_written_again(store: Root, tmp_path: Path) -> None:
    first = run_of(store, tmp_path)
    numbers = first.read(Lines(), pool(tmp_path / "pool", 3))["numbers"]
    written = first.export(Print(), numbers)
    files = {path: first.directory.read(path) for path in written}
    assert files == {
        "printed/1.txt": b"1\n2\n3\n",
        "printed/11.txt": b"11\n12\n13\n",
        "printed/21.txt": b"21\n22\n23\n",
    }
    first.directory.delete("printed/11.txt")
    first.directory.write("printed/21.txt", b"21\n")
    again = run_of(store, tmp_path)
    assert again.export(Print(), numbers) == written
    assert made(again) == [("print", 2)]
    assert {path: again.directory.read(path) for path in written} == files


Sent = list[list[tuple[int, int]]]


@settings(max_examples=60, deadline=None)
@cases(
    st.lists(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 99)), max_size=12), min_size=1, max_size=6),
    st.integers(1, 6),
    st.integers(0, 5),
)
def test_a_shuffle_groups_rows_by_destination_in_the_order_of_their_origin_however_they_come(
    sent: Sent, group: int, piece: int
) -> None:
    """`piece`: rows of a table where they come by and by; 0: as one table."""
    blobs = []
    for rows in sent:
        to, value = ([row[i] for row in rows] for i in (0, 1))
        table = pa.table({"to": pa.array(to, pa.int32()), "value": pa.array(value, pa.int64())})
        out = io.BytesIO()
        tables = (table.slice(first, piece) for first in range(0, len(rows), piece or 1))
        assert to_shuffle(tables if piece else table, 5, out) == len(rows)
        blobs.append(out.getvalue())
    sizes = [(len(rows), len(data)) for rows, data in zip(sent, blobs, strict=True)]
    files = [File(f"{at}", digest([at]), size, rows, buckets=5) for at, (rows, size) in enumerate(sizes)]
    dataset = Dataset("sent", "key", tuple(Part(f"{at}", (file,)) for at, file in enumerate(files)))
    shuffled = dataset.grouped(group).shuffled(5)
    assert len(shuffled) == 5
    with TemporaryDirectory() as folder:
        for store in (Root("memory://shuffle"), Root(folder)):
            for at, data in enumerate(blobs):
                store.write(f"{at}", data)
            for bucket, part in enumerate(shuffled.parts):
                expected = [value for rows in sent for to, value in rows if to == bucket]
                table = StoredRows(store, part).table()
                assert (table.column("value").to_pylist() if table.num_columns else []) == expected
                assert part.id == dataset.shuffled(5).parts[bucket].id


def test_what_many_files_hold_for_a_bucket_is_fetched_side_by_side() -> None:
    """Each read waits for another."""
    both = Barrier(2, timeout=20)

    class Waiting(Root):
        def read(self, path: str, start: int | None = None, stop: int | None = None) -> bytes:
            both.wait()
            return super().read(path, start, stop)

    store, files = Waiting(f"memory://{uuid.uuid4().hex}"), []
    for at in range(2 * FETCHES):
        out = io.BytesIO()
        to_shuffle(pa.table({"to": pa.array([0] * 9, pa.int32()), "value": np.full(9, at)}), 1, out)
        store.write(f"{at}", out.getvalue())
        files.append(File(f"{at}", digest([at]), len(out.getvalue()), 9, buckets=1))
    (part,) = Dataset("sent", "key", (Part("all", tuple(files)),)).shuffled(1).parts
    assert [table.column("value")[0].as_py() for table in StoredRows(store, part).pieces()] == list(range(2 * FETCHES))


def test_blobs_that_are_fetched_together_are_few_or_small() -> None:
    sizes = [1] * (FETCHES + 1) + [FETCH_BYTES] * 2 + [FETCH_BYTES - 1, 5, 5]
    together = [[e.length for e in some] for some in _together(_Entry("", 0, size, "") for size in sizes)]
    assert together == [[1] * FETCHES, [1, FETCH_BYTES], [FETCH_BYTES], [FETCH_BYTES - 1, 5], [5]]
    assert list(_together([])) == []


def test_rows_that_are_read_group_by_group_are_the_same_rows(tmp_path: Path) -> None:
    run = run_of(Root(str(tmp_path / "store")), tmp_path)
    numbers = run.read(Lines(), pool(tmp_path / "pool", 5))["numbers"]
    groups = numbers.grouped(2)
    assert [p.name for p in groups.parts] == ["000.txt..001.txt", "002.txt..003.txt", "004.txt"]
    assert [n for rows in products(run, groups) for n in rows] == [n for rows in products(run, numbers) for n in rows]
    assert [run.rows(p).lengths for p in groups.parts] == [[3, 3], [3, 3], [3]]
    assert [f["count"] for p in groups.parts for f in run.rows(p).facts] == [3] * 5
    overlapping = numbers.joined([range(0, 2), range(1, 4)])
    assert products(run, overlapping) == [[1, 2, 3, 11, 12, 13], [11, 12, 13, 21, 22, 23, 31, 32, 33]]
    assert products(run, numbers.grouped(5).spread(2)) == [products(run, numbers.grouped(5))[0]] * 2


def test_a_record_whose_value_was_changed_is_damaged() -> None:
    assert unsealed(sealed({"rows": 3})) == {"rows": 3}
    with pytest.raises(ValueError, match="a damaged record"):
        unsealed(sealed({"rows": 3}).replace(b"3", b"4", 1))


def test_plain_values_have_one_form_and_others_are_refused() -> None:
    assert canonical({"b": [1, None], "a": "ü"}) == b'{"a":"\\u00fc","b":[1,null]}'
    with pytest.raises(ValueError, match="Out of range float"):
        canonical({"a": float("nan")})
    with pytest.raises(TypeError, match="not JSON serializable"):
        canonical({"a": {1, 2}})


def test_parquet_bytes_depend_on_the_rows_alone() -> None:
    column = pa.array(range(10))
    whole = pa.table({"a": column})
    pieces = pa.concat_tables([whole.slice(0, 3), whole.slice(3)])
    assert to_parquet(whole) == to_parquet(pieces)


def texts(values: Sequence[str]) -> Texts:
    held = Texts()
    for value in values:
        held.append(value)
    return held


@cases(st.lists(st.sampled_from(["", "{}", '{"n":1}', '{"name":"Grüße, 世界"}']), max_size=8), st.data())
def test_texts_in_one_piece_are_those_that_were_appended(values: list[str], data: st.DataObject) -> None:
    held, bounds = texts(values), st.integers(-len(values), len(values))
    piece = slice(data.draw(bounds), data.draw(bounds))
    assert held == values and held[piece] == values[piece] and held[::-2] == values[::-2]
    assert type(held[piece]) is list, "a task is sent with its slice: what that holds must not grow with the pool"
    assert [held[at] for at in range(-len(values), len(values))] == 2 * values
    runs = [value for at, value in enumerate(values) if not at or value != values[at - 1]]
    assert held.utf8.decode() == "".join(runs)


def listed(files: int) -> tuple[Dataset, Dataset]:
    """The same files as columns, and as values one by one."""
    keys, digests = ([digest([kind, i]) for i in range(files)] for kind in ("key", "content"))
    facts = [f'{{"rows":{i}}}' for i in range(files)]
    packed = b"".join(
        PACKED.pack(bytes.fromhex(key), bytes.fromhex(content * 2), 10 + i, i, 5)
        for i, (key, content) in enumerate(zip(keys, digests, strict=True))
    )
    names = [f"{i}.tar" for i in range(files)]
    plain = tuple(
        Part(name, (File(part_path("sent", "rows", keys[i], digests[i] * 2), digests[i] * 2, 10 + i, i, facts[i], 5),))
        for i, name in enumerate(names)
    )
    columns = Committed("sent", "rows", packed, texts(facts))
    with pytest.raises(ValueError, match="no step of 2"):
        columns[::2]
    return Dataset("sent", "key", Listed(names, columns)), Dataset("sent", "key", plain)


def test_a_file_as_columns_is_the_file() -> None:
    content = "ab" * 32
    packed = PACKED.pack(bytes.fromhex("0f" * 16), bytes.fromhex(content), 7, 3, 2)
    (file,) = Committed("sent", "rows", packed, texts(["{}"]))
    assert file == File(f"parts/sent/0f/{'0f' * 16}-rows-abababababababab", content, 7, 3, "{}", 2)


@settings(max_examples=60, deadline=None)
@cases(st.integers(1, 12), st.integers(1, 5), st.integers(0, 4), st.data())
def test_parts_that_are_made_when_asked_for_are_those_made_at_once(
    files: int, group: int, bucket: int, data: st.DataObject
) -> None:
    columns, plain = listed(files)
    bounds = st.integers(-files, files)
    piece = slice(data.draw(bounds), data.draw(bounds))
    assert columns == plain
    assert list(columns.parts[piece]) == list(plain.parts[piece])
    assert [columns.parts[at] for at in range(-files, files)] == [plain.parts[at] for at in range(-files, files)]
    groups = [plain.parts[at : at + group] for at in range(0, files, group)]
    for dataset in (columns, plain):
        assert list(dataset.ids()) == [part.id for part in plain.parts]
        assert dataset.num_rows == sum(range(files))
        grouped = dataset.grouped(group)
        assert [[f for part in g for f in part.files] for g in groups] == [list(p.files) for p in grouped.parts]
        assert list(grouped.ids()) == list(plain.grouped(group).ids())
        joined = dataset.joined([range(0, files), range(files - 1, files)])
        assert joined.parts[1] == plain.parts[-1]
        assert joined.parts[0].id == plain.grouped(files).parts[0].id
        shuffled = dataset.shuffled(5).parts[bucket]
        assert isinstance(shuffled, Bucket)
        assert {file.bucket for file in shuffled.files} == {bucket}
        assert shuffled == plain.shuffled(5).parts[bucket]
        assert len({part.id for part in dataset.shuffled(5).parts}) == 5
    with pytest.raises(IndexError):
        columns.parts[files]


def test_parts_that_differ_are_not_equal() -> None:
    columns, plain = listed(3)
    assert columns != listed(4)[0]
    changed = (*plain.parts[:2], Part("2.tar", (File("", "", 0, 0),)))
    assert columns != Dataset("sent", "key", changed)


def test_receipts_come_back_as_they_were_added() -> None:
    held = Receipts()
    receipts = [{"key": digest(i), "files": {}, "facts": {"rows": i, "share": 0.1 * i}} for i in range(20)]
    for receipt in receipts:
        held.add(receipt)
    assert [held[receipt["key"]] for receipt in receipts] == receipts
    assert [held.record(key) for key in held] == [sealed(receipt) for receipt in receipts]
    held.add({**receipts[3], "facts": {}})
    held.drop(receipts[4]["key"])
    assert held[receipts[3]["key"]]["facts"] == {}
    assert receipts[4]["key"] not in held
    assert len(list(held)) == 19


def test_a_manifest_of_several_batches_holds_every_receipt_in_order(tmp_path: Path) -> None:
    count = 2 * RECEIPT_BATCH + 1
    run = run_of(Root(str(tmp_path / "store")), tmp_path)
    found = Receipts()
    files = {"products": {"path": "", "sha256": "00" * 32, "bytes": 0, "rows": 0, "buckets": 0}}
    for i in range(count):
        found.add({"key": digest(i), "files": files, "facts": {"rows": i}, "content": None})
    keys = [digest(i) for i in range(count)]
    run._finish(Times(2), keys, found, keys)
    (path,) = run.store.list("manifests")
    data = run.store.read(path)
    manifest = pq.ParquetFile(io.BytesIO(data))
    assert manifest.metadata.num_row_groups == 3
    assert manifest.read().column("key").to_pylist() == keys
    assert list(in_order(data)) == [{**found[key], "name": key} for key in keys]


def test_the_manifest_of_equal_units_does_not_tell_which_of_them_was_made_first(tmp_path: Path) -> None:
    units = [unit(tmp_path / "pool" / f"{i}.txt", [7, 8]) for i in range(2)]
    manifests = []
    for name, first in (("one", units[:1]), ("two", units[1:])):
        store = Root(str(tmp_path / name))
        run_of(store, tmp_path).read(Lines(), first)
        run = run_of(store, tmp_path)
        run.read(Lines(), units)
        ((path, _),) = run.manifests.items()
        manifests.append((path, store.read(path)))
    assert manifests[0] == manifests[1]
    assert [receipt["name"] for receipt in in_order(manifests[0][1])] == ["0.txt", "1.txt"]


def test_a_manifest_that_names_a_part_twice_and_is_damaged_at_the_second_is_written_again(tmp_path: Path) -> None:
    store = Root(str(tmp_path / "store"))
    units = [unit(tmp_path / "pool" / f"{i}.txt", [7, 8]) for i in range(2)]
    run_of(store, tmp_path).read(Lines(), units)
    (path,) = store.list("manifests/lines")
    whole = store.read(path)
    (first, _) = in_order(whole)
    records = [sealed(first).decode(), sealed(first).decode().replace("7", "8")]
    store.write(path, to_parquet(pa.table({"key": [first["key"]] * 2, "receipt": records}, schema=RECEIPTS)))
    run_of(store, tmp_path).read(Lines(), units)
    assert store.read(path) == whole


@pytest.mark.parametrize("rows", [[1, 0], [0], [0, 1, 1]], ids=["other order", "too few", "too many"])
def test_a_manifest_that_holds_other_parts_than_asked_for_is_written_again(tmp_path: Path, rows: list[int]) -> None:
    store = Root(str(tmp_path / "store"))
    units = [unit(tmp_path / "pool" / f"{i}.txt", [i]) for i in range(2)]
    run_of(store, tmp_path).read(Lines(), units)
    (path,) = store.list("manifests/lines")
    whole = store.read(path)
    store.write(path, to_parquet(pq.read_table(io.BytesIO(whole)).take(rows)))
    numbers = run_of(store, tmp_path).read(Lines(), units)["numbers"]
    assert [StoredRows(store, part).table().column("number").to_pylist() for part in numbers.parts] == [[0], [1]]
    assert store.read(path) == whole


def test_each_part_of_a_dataset_has_its_own_facts(tmp_path: Path) -> None:
    units = [
        unit(tmp_path / "pool" / f"{i}.txt", range(10 * i, 10 * i + count)) for i, count in enumerate([1, 2, 2, 1])
    ]
    numbers = run_of(Root(str(tmp_path / "store")), tmp_path).read(Lines(), units)["numbers"]
    assert [facts["count"] for facts in numbers.facts()] == [1, 2, 2, 1]
    doubled = run_of(Root(str(tmp_path / "store")), tmp_path).map(Times(2), numbers)["products"]
    assert [json.dumps(facts) for facts in doubled.facts()] == ["{}"] * 4
