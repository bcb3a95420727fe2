"""Pools made of nothing but damage, from shard to run directory: every count is that of the truth table.

Recovered rows, rows with a problem and the faults of their shards are the truth of tests/corpus*.py; nothing crashes,
hangs, is executed, or is lost without a line in problems/.
"""

from __future__ import annotations

import gzip
import json
import resource
import subprocess
import sys
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import cli
from pipeline.curate import Curated, curate
from pipeline.errors import RunError
from pipeline.executor import Failure, Serial, Worker
from pipeline.machine import Machine
from pipeline.recipe import recipe_of
from pipeline.run import Run, Task
from pipeline.schema import SAMPLE_PROBLEMS, SHARD_PROBLEMS
from pipeline.storage import Root
from pipeline.verify import verify
from tests import corpus, corpus_samples, corpus_tables
from tests.corpus_samples import Sample
from tests.corpus_tables import ROWS, Unit
from tests.pools import webdataset_pool

LARGE_BYTES = 1 << 14
"""A tar of more is stored as .tar.gz, so that the whole corpus stays below 1 MB."""


class Written:
    """A finished run over a pool, and what it wrote."""

    def __init__(self, pool: Path, run: Path, layout: str, **recipe: Any) -> None:
        self.pool, self.run = pool, run
        plain = {"pool": {"format": layout, "path": str(pool)}, "limits": {"max_unreadable": 1}, **recipe}
        task = Run(Root(f"{run}/store"), Root(str(run)), Serial(), Machine(scratch=str(run.parent)))
        self.curated: Curated = curate(task, recipe_of(plain))
        self.rows = pq.read_table(run / "decisions").to_pylist()
        self.lines = pq.read_table(run / "problems").to_pylist()

    def of(self, shard: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Rows and lines of one shard."""
        return [r for r in self.rows if r["shard"] == shard], [x for x in self.lines if x["shard"] == shard]

    def differences(self) -> list[str]:
        return [str(d) for d in verify(Root(str(self.run)), Root(f"{self.run}/store"), Machine())]


def put_tar(folder: Path, stem: str, data: bytes) -> str:
    """Write a shard; its name."""
    large = len(data) > LARGE_BYTES
    name = f"{stem}.tar.gz" if large else f"{stem}.tar"
    (folder / name).write_bytes(gzip.compress(data, 6, mtime=0) if large else data)
    return name


def put_units(folder: Path, units: Sequence[Unit]) -> None:
    folder.mkdir()
    for unit in units:
        for ending, content in unit.files.items():
            (folder / f"{unit.name}.{ending}").write_bytes(content)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("damaged")


@pytest.fixture(scope="module")
def tars(folder: Path) -> tuple[Written, dict[str, corpus.Case]]:
    (folder / "tars").mkdir()
    cases = {put_tar(folder / "tars", f"{i:03d}", case.data): case for i, case in enumerate(corpus.everything())}
    return Written(folder / "tars", folder / "tars-run", "webdataset"), cases


@pytest.fixture(scope="module")
def samples(folder: Path) -> tuple[Written, dict[str, list[Sample]]]:
    (folder / "samples").mkdir()
    shards = {kind: make() for kind, make in corpus_samples.KINDS.items()}
    named = {put_tar(folder / "samples", kind, corpus_samples.tar_of(found)): found for kind, found in shards.items()}
    models = {"tiny": {"weights": "tiny"}}
    return Written(folder / "samples", folder / "samples-run", "webdataset", models=models), named


@pytest.fixture(scope="module")
def canary(folder: Path) -> Path:
    return folder / "executed"


@pytest.fixture(scope="module")
def tables(folder: Path, canary: Path) -> tuple[Written, list[Unit]]:
    units = list(corpus_tables.arrays(canary))
    put_units(folder / "tables", units)
    models = {"own": {"image": "img", "text": "txt"}}
    return Written(folder / "tables", folder / "tables-run", "datacomp", models=models), units


@pytest.fixture(scope="module")
def images(folder: Path, canary: Path) -> tuple[Written, list[Unit]]:
    units = list(corpus_tables.images(canary))
    put_units(folder / "images", units)
    write = {"images": True}
    return Written(folder / "images", folder / "images-run", "parquet", write=write), units


@pytest.mark.goal("R8")
def test_every_tar_amounts_to_its_truth(tars: tuple[Written, dict[str, corpus.Case]]) -> None:
    written, cases = tars
    for shard, case in cases.items():
        rows, lines = written.of(shard)
        assert [r["key"] for r in rows if r["kept"]] == list(case.kept), case.name
        refused = [(r["key"], r["problem"]) for r in rows if not r["kept"]]
        assert [problem for _, problem in refused] == [problem for _, problem in case.problems], case.name
        assert all(known in (None, key) for (key, _), (known, _) in zip(refused, case.problems, strict=True)), case.name
        assert [(x["key"], x["reason"]) for x in lines if x["key"] is not None] == refused, case.name
        faults = [x for x in lines if x["key"] is None]
        assert [x["reason"] for x in faults] == list(case.faults), case.name
        assert all(x["offset"] is not None and x["detail"] for x in lines), case.name


@pytest.mark.goal("R8")
def test_no_sample_of_a_damaged_tar_is_lost_without_a_fault_of_its_shard(
    tars: tuple[Written, dict[str, corpus.Case]],
) -> None:
    written, cases = tars
    for shard, case in cases.items():
        rows, lines = written.of(shard)
        stated = {key for key in corpus.KEYS if f"{key}.jpg".encode() in case.data}
        if stated - {r["key"] for r in rows}:
            assert any(x["key"] is None for x in lines), case.name


@pytest.mark.goal("R7", "R8")
def test_the_totals_of_the_tars_are_those_of_the_truth_table(
    tars: tuple[Written, dict[str, corpus.Case]], record_property: pytest.RecordProperty
) -> None:
    written, cases = tars
    kept = sum(len(case.kept) for case in cases.values())
    truth = Counter(problem for case in cases.values() for _, problem in case.problems)
    assert Counter(r["problem"] for r in written.rows) == truth | {None: kept}
    assert Counter(x["reason"] for x in written.lines if x["key"] is None) == Counter(
        fault for case in cases.values() for fault in case.faults
    )
    curated = written.curated
    assert (curated.kept, curated.unreadable) == (kept, truth.total())
    assert curated.listed == curated.kept + curated.unreadable == len(written.rows)
    assert curated.damaged == sum(bool(case.faults) for case in cases.values())
    assert {x["reason"] for x in written.lines} <= {*SAMPLE_PROBLEMS, *SHARD_PROBLEMS}
    assert sum(json.loads(p.read_text())["count"] for p in written.run.glob("filtered/*_stats.json")) == kept
    problems = ", ".join(f"{count} {problem}" for problem, count in sorted(truth.items()))
    record_property("figure", f"damaged tars: {curated.listed} rows = {kept} kept + {problems}")


@pytest.mark.goal("R8")
def test_every_image_and_text_amounts_to_its_truth(samples: tuple[Written, dict[str, list[Sample]]]) -> None:
    written, shards = samples
    for shard, truth in shards.items():
        rows, lines = written.of(shard)
        assert [(r["key"], r["problem"]) for r in rows] == [(s.key, s.problem) for s in truth]
        assert sorted((x["key"], x["reason"]) for x in lines) == sorted((s.key, s.problem) for s in truth if s.problem)
        assert all(x["offset"] is not None and x["detail"] for x in lines)
        assert all((r["score_tiny"] is None) == bool(r["problem"]) for r in rows)


@pytest.mark.goal("R8")
def test_every_unit_of_arrays_and_metadata_amounts_to_its_truth(tables: tuple[Written, list[Unit]]) -> None:
    check_units(*tables)


@pytest.mark.goal("R8")
def test_every_parquet_file_of_images_amounts_to_its_truth(images: tuple[Written, list[Unit]]) -> None:
    check_units(*images)
    kept = pq.read_table(images[0].run / "parquet")
    healthy = kept.filter(pa.compute.equal(kept["shard"], "00-healthy.parquet"))
    assert healthy["image"].to_pylist() == [
        corpus_samples.stored(corpus_samples.picture(8 + row, 8), "PNG") for row in range(ROWS)
    ]


def check_units(written: Written, units: list[Unit]) -> None:
    for unit in units:
        rows, lines = written.of(f"{unit.name}.parquet")
        assert len(rows) == unit.rows, unit.name
        assert Counter(r["problem"] for r in rows if r["problem"]) == unit.problems, unit.name
        assert all(r["kept"] == (r["problem"] is None) for r in rows), unit.name
        assert [x["reason"] for x in lines if x["key"] is None] == list(unit.faults), unit.name
        told = [(x["key"], x["reason"]) for x in lines if x["key"] is not None]
        assert sorted(told) == sorted((r["key"], r["problem"]) for r in rows if r["problem"]), unit.name
    assert written.curated.listed == sum(unit.rows for unit in units)
    assert written.curated.unreadable == sum(sum(unit.problems.values()) for unit in units)
    assert written.curated.damaged == sum(bool(unit.faults) for unit in units)


@pytest.mark.goal("S-a")
def test_nothing_in_the_pools_was_executed(
    tables: tuple[Written, list[Unit]],
    images: tuple[Written, list[Unit]],
    canary: Path,
    record_property: pytest.RecordProperty,
) -> None:
    assert not canary.exists()
    corpus_tables.pickle.loads(corpus_tables.pickle.dumps(corpus_tables.Canary(canary)))
    assert canary.exists()  # the control: unpickled, the canary leaves its file
    canary.unlink()
    hostile = [unit for unit in (*tables[1], *images[1]) if unit.name.endswith(("objects", "extension-type"))]
    assert len(hostile) == 3
    record_property("figure", f"{len(hostile)} pickles in arrays and schemas: refused, 0 executed; the control was")


@pytest.mark.goal("R8")
def test_verify_finds_no_difference_in_a_run_over_damage(
    tars: tuple[Written, dict[str, corpus.Case]],
    samples: tuple[Written, dict[str, list[Sample]]],
    tables: tuple[Written, list[Unit]],
    images: tuple[Written, list[Unit]],
) -> None:
    assert [written.differences() for written in (tars[0], samples[0], tables[0], images[0])] == [[]] * 4


@pytest.mark.goal("R8")
def test_the_corpus_has_more_than_eighty_files_and_less_than_a_megabyte(
    tars: tuple[Written, dict[str, corpus.Case]],
    samples: tuple[Written, dict[str, list[Sample]]],
    tables: tuple[Written, list[Unit]],
    images: tuple[Written, list[Unit]],
    record_property: pytest.RecordProperty,
) -> None:
    runs = [tars[0], samples[0], tables[0], images[0]]
    files = [path for written in runs for path in written.pool.iterdir()]
    stored = sum(path.stat().st_size for path in files)
    assert len(files) >= 80
    assert stored < 1_000_000
    kept, dropped = sum(w.curated.kept for w in runs), sum(w.curated.unreadable for w in runs)
    faults = Counter(line["reason"] for w in runs for line in w.lines if line["key"] is None)
    record_property(
        "figure",
        f"{len(files)} files, {stored:,} bytes: {kept} rows recovered, {dropped} dropped, {faults.total()} faults of "
        f"shards ({', '.join(f'{count} {reason}' for reason, count in sorted(faults.items()))}): all as in the truth",
    )


MEASURE = """
import os, resource, sys, time
from pipeline.images import decode
for path in sys.argv[1:]:
    pid = os.fork()
    if not pid:
        data = open(path, "rb").read()
        start = time.process_time()
        found = decode(data)
        print(found.reason, time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, flush=True)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
"""
"""Each image in a process of its own, so that the peak of memory is its own."""


@pytest.mark.goal("S-g")
def test_each_bomb_is_dropped_within_a_second_and_a_gibibyte(
    tmp_path: Path, record_property: pytest.RecordProperty
) -> None:
    bombs = corpus_samples.bombs()
    for sample in bombs:
        (tmp_path / sample.key).write_bytes(sample.image)
    command = [sys.executable, "-c", MEASURE, *(str(tmp_path / sample.key) for sample in bombs)]
    ran = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    found = [line.split() for line in ran.stdout.splitlines()]
    for sample, (reason, seconds, kib) in zip(bombs, found, strict=True):
        assert (reason, float(seconds) < 1, int(kib) < 1 << 20) == (sample.problem, True, True), sample.key
    slowest, largest = max(float(seconds) for _, seconds, _ in found), max(int(kib) for _, _, kib in found)
    record_property("figure", f"{len(bombs)} bombs: at most {slowest * 1000:.0f} ms and {largest >> 10} MiB each")


@pytest.mark.goal("R15")
def test_a_header_that_states_2_60_bytes_costs_nothing(tmp_path: Path) -> None:
    case = next(case for case in corpus.everything() if case.name == "a size of 2^60")
    (tmp_path / "0.tar").write_bytes(case.data)
    before = resource.getrusage(resource.RUSAGE_SELF)
    written = Written(tmp_path, tmp_path / "run", "webdataset")
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert written.curated.kept == len(case.kept)
    assert after.ru_utime - before.ru_utime < 5
    assert after.ru_maxrss - before.ru_maxrss < 1 << 18


def test_a_tar_gz_that_grows_without_bound_is_cut(tmp_path: Path) -> None:
    shard = corpus.healthy()[: -len(corpus.END)] + corpus.member("bomb.bin", bytes(200 << 20)) + corpus.END
    (tmp_path / "0.tar.gz").write_bytes(gzip.compress(shard, 1))
    written = Written(tmp_path, tmp_path / "run", "webdataset")
    assert written.curated.kept == len(corpus.KEYS)
    fault = next(x for x in written.lines if x["key"] is None)
    assert (fault["shard"], fault["reason"]) == ("0.tar.gz", "truncated")
    assert "grows to more than 134217728 bytes" in fault["detail"]


NUMBERS: dict[str, Callable[[int], list[float]]] = {
    "all equal": lambda rows: [0.25] * rows,
    "zeros of both signs": lambda rows: [0.0, -0.0] * (rows // 2),
    "denormal": lambda rows: [5e-324 * row for row in range(rows)],
    "not finite": lambda rows: [np.nan, np.inf, -np.inf, 0.5] * (rows // 4),
}


@pytest.mark.goal("R13")
@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("clusters", [1, 3, 100])
def test_scores_that_are_equal_or_odd_and_more_clusters_than_rows_still_fill_the_quota(
    tmp_path: Path, name: str, clusters: int
) -> None:
    rows = 8
    score = NUMBERS[name](rows)
    unit = corpus_tables.metadata("numbers", rows) | {"similarity": score}
    image, text = corpus_tables.vectors("n", rows), corpus_tables.vectors("t", rows)
    files = {"parquet": corpus_tables.parquet(pa.table(unit)), "npz": corpus_tables.npz(img=image, txt=text)}
    put_units(tmp_path / "pool", [Unit("0", files)])
    select = [
        {"cut": {"score": "column:similarity", "keep": 0.75, "of": "pool"}},
        {"density": {"space": "own", "clusters": clusters, "keep": 0.5}},
    ]
    models = {"own": {"image": "img", "text": "txt"}}
    written = Written(tmp_path / "pool", tmp_path / "run", "datacomp", models=models, select=select)
    finite = int(np.isfinite(score).sum())
    after_cut = min(finite, 6)
    assert [left for _, _, left in written.curated.funnel] == [rows, after_cut, after_cut // 2]
    assert Counter(r["reason"] for r in written.rows if r["step"] == "01-cut") == Counter(
        {"no_score": rows - finite, "low_score": finite - after_cut}
    ) - Counter({"": 0})
    assert written.differences() == []


def run_cli(tmp_path: Path, pool: Path, **recipe: Any) -> int:
    plain = {"pool": {"format": "webdataset", "path": str(pool)}, **recipe}
    (tmp_path / "recipe.yaml").write_text(json.dumps(plain))
    return cli.main(["run", str(tmp_path / "recipe.yaml"), "--run", str(tmp_path / "run"), "--executor", "serial"])


def test_more_damage_than_the_limit_ends_with_3_and_everything_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pool = webdataset_pool(tmp_path / "pool", 2, 18, 1)
    assert run_cli(tmp_path, pool, limits={"max_unreadable": 0.5}) == 0
    assert run_cli(tmp_path, pool, limits={"max_unreadable": 0}) == 3
    assert "more input was damaged than the recipe's limits allow" in capsys.readouterr().err
    assert (tmp_path / "run/checksums.sha256").exists()
    assert list(verify(Root(str(tmp_path / "run")), Root(str(tmp_path / "run/store")), Machine())) == []


def test_a_pool_without_a_readable_sample_is_finished_and_says_so(tmp_path: Path) -> None:
    (tmp_path / "pool").mkdir()
    shard = corpus.Shard().add("a.txt", b"x").add("b.txt", b"y").closed()
    (tmp_path / "pool/0.tar").write_bytes(shard)
    assert run_cli(tmp_path, tmp_path / "pool", select=[{"random": {"keep": 0.5}}]) == 3
    rows = pq.read_table(tmp_path / "run/decisions").to_pylist()
    assert [(r["key"], r["problem"], r["kept"]) for r in rows] == [
        ("a", "missing_image", False),
        ("b", "missing_image", False),
    ]


def test_a_pool_without_any_sample_is_a_mistake_that_names_the_damage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "pool").mkdir()
    (tmp_path / "pool/0.tar").write_bytes(b"<html>403</html>" * 99)
    assert run_cli(tmp_path, tmp_path / "pool") == 2
    assert "no sample in 1 shards; 0.tar: not_a_tar: " in capsys.readouterr().err


class Meddling(Serial):
    """Does something to the pool just before the first task of a stage."""

    def __init__(self, stage: str, meddle: Callable[[], object]) -> None:
        super().__init__()
        self.stage = stage
        self.meddle = meddle

    def each(self, worker: Worker, tasks: Iterable[Any], gpu: bool = False) -> Iterator[tuple[int, Any | Failure]]:
        for position, task in enumerate(tasks):
            if isinstance(task, Task) and task.stages[0].name == self.stage:
                self.meddle()
                self.stage = ""
            for _, result in super().each(worker, [task], gpu):
                yield position, result


def curate_in(folder: Path, pool: str, executor: Serial) -> Run:
    run = Run(Root(str(folder / "run/store")), Root(str(folder / "run")), executor, Machine(scratch=str(folder)))
    curate(run, recipe_of({"pool": {"format": "webdataset", "path": pool}, "limits": {"max_unreadable": 1}}))
    return run


def parts_made(run: Run, stage: str) -> int:
    return sum(entry["parts"] for entry in run.times if entry["stage"] == stage)


def test_a_shard_that_vanishes_is_named_and_a_rerun_finishes(tmp_path: Path) -> None:
    pool = webdataset_pool(tmp_path / "pool", 3, 6, 1)
    lost = (pool / "00001.tar").read_bytes()
    with pytest.raises(RunError, match=r"read: 1 of its parts could not be made.*\n  00001\.tar: FileNotFoundError"):
        curate_in(tmp_path, str(pool), Meddling("read", (pool / "00001.tar").unlink))
    (pool / "00001.tar").write_bytes(lost)
    again = curate_in(tmp_path, str(pool), Serial())
    assert parts_made(again, "read") == 1


@pytest.mark.parametrize("place", ["local", "memory"])
@pytest.mark.parametrize("stage", ["read", "write_tar"])
@pytest.mark.parametrize("change", ["content", "length"])
def test_a_shard_that_changes_after_it_was_listed_is_never_copied(
    tmp_path: Path, place: str, stage: str, change: str
) -> None:
    pool = webdataset_pool(tmp_path / "pool", 2, 6, 1)
    first, second = ((pool / f"0000{i}.tar").read_bytes() for i in range(2))
    assert len(first) == len(second)
    root = Root(str(tmp_path / "alone") if place == "local" else f"memory://{uuid.uuid4().hex}")
    root.write("00000.tar", first)
    other = second if change == "content" else second + corpus.END
    with pytest.raises(RunError, match=r"\n  00000\.tar: OSError: .*when it was listed|changed since it was listed"):
        curate_in(tmp_path, f"{root.url}/00000.tar", Meddling(stage, lambda: root.write("00000.tar", other)))
    assert not (tmp_path / "run/checksums.sha256").exists()
    curate_in(tmp_path, f"{root.url}/00000.tar", Serial())
    assert [str(d) for d in verify(Root(str(tmp_path / "run")), Root(str(tmp_path / "run/store")), Machine())] == []
    keys = pq.read_table(tmp_path / "run/decisions")["key"].to_pylist()
    assert all(key.startswith("00001") for key in keys)


def test_a_tar_that_is_gone_leaves_its_rows_and_its_name(tmp_path: Path) -> None:
    webdataset_pool(tmp_path / "pool", 3, 18, 1)
    (tmp_path / "pool/00001.tar").unlink()
    written = Written(tmp_path / "pool", tmp_path / "run", "webdataset")
    rows, lines = written.of("00001.parquet")
    assert [row["problem"] for row in rows] == ["missing_image"] * 17
    assert [line["reason"] for line in lines if line["key"] is None] == ["empty"]
    assert written.curated.damaged == 1 and written.curated.kept == 32
    assert (tmp_path / "run/filtered/00000000.tar").exists()
    assert written.differences() == []
