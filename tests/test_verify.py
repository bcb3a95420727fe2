"""verify finds nothing in a run as it was written, and names whatever is changed in it."""

from __future__ import annotations

import io
import shutil
import tarfile
import uuid
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import UserError
from pipeline.machine import Machine
from pipeline.storage import Root
from pipeline.verify import Difference, verify
from pipeline.write import SUBSET
from tests.pools import webdataset_pool
from tests.runs import datacomp_run, reseal, run_recipe, webdataset, webdataset_run

TAR = "filtered/00000000.tar"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return webdataset_run(tmp_path_factory.mktemp("written"))


@pytest.fixture
def run(written: Path, tmp_path: Path) -> Path:
    """A copy to be tampered with; its pool stays where it was."""
    return Path(shutil.copytree(written, tmp_path / "run"))


def differences(run: Path | str, store: str | None = None) -> list[Difference]:
    return list(verify(Root(str(run)), Root(store or f"{run}/store"), Machine()))


def said(run: Path, file: str) -> list[str]:
    """What is said of one file, the sample first where it is of one."""
    return [str(d).removeprefix(f"{file}: ") for d in differences(run) if d.file == file]


def samples_in(tar: Path) -> list[tuple[str, bytes]]:
    with tarfile.open(tar) as file:
        return [(member.name, file.extractfile(member).read()) for member in file]  # type: ignore[union-attr]


def rewrite(tar: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(tar, "w", format=tarfile.USTAR_FORMAT) as file:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(bytes(data))


def edit(path: Path, row: int, **values: object) -> None:
    table = pq.read_table(path)
    rows = table.to_pylist()
    rows[row] |= values
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), path)


def test_a_run_as_written_has_no_difference(written: Path) -> None:
    assert differences(written) == []
    assert len(list(written.glob("filtered/*.tar"))) == 3
    assert len(list(written.glob("decisions/*"))) == 2


def test_neither_have_runs_of_other_kinds(tmp_path: Path) -> None:
    assert differences(datacomp_run(tmp_path / "datacomp")) == []
    assert differences(webdataset_run(tmp_path / "annotated", annotate=True)) == []
    pool = tmp_path / "folders"
    webdataset_pool(pool / "a", 1, 9, 1)
    webdataset_pool(pool / "b", 1, 9, 2)
    run_recipe(webdataset(pool), str(tmp_path / "both"))
    keys = pq.read_table(tmp_path / "both/filtered/00000000.parquet")["key"].to_pylist()
    assert {key[:4] for key in keys} == {"000_", "001_"}
    assert differences(tmp_path / "both") == []


def test_neither_has_a_run_on_an_object_store(tmp_path: Path) -> None:
    url = f"memory://{uuid.uuid4().hex}"
    run_recipe(webdataset(webdataset_pool(tmp_path / "pool", 2, 9, 1)), f"{url}/run", f"{url}/store")
    assert differences(f"{url}/run", f"{url}/store") == []
    root = Root(f"{url}/run")
    data = bytearray(root.read(TAR))
    data[600] ^= 1
    root.write(TAR, bytes(data))
    assert {d.file for d in differences(f"{url}/run", f"{url}/store")} == {TAR}


def test_a_flipped_byte_in_a_tar_is_named_with_its_sample(run: Path) -> None:
    name, _ = samples_in(run / TAR)[0]
    flip(run / TAR, 600)
    key = name.partition(".")[0]
    assert said(run, TAR) == [
        "its bytes are not those of its checksum",
        f"00000.tar {key}: {name} does not have the bytes that the pool has",
    ]


def test_a_flipped_byte_in_a_header_is_named(run: Path) -> None:
    flip(run / TAR, 3)
    assert said(run, TAR)[1].startswith("bad_header at byte 0")


def test_a_lost_and_a_foreign_file_are_named(run: Path) -> None:
    (run / "filtered/00000001_stats.json").unlink()
    (run / "filtered/notes.txt").write_text("mine")
    assert differences(run) == [
        Difference("filtered/notes.txt", "not listed in the checksums"),
        Difference("filtered/00000001_stats.json", "missing"),
    ]


def test_times_and_store_may_change(run: Path) -> None:
    (run / "times.json").write_text("{}")
    (run / "store/stray").write_text("mine")
    assert differences(run) == []


def test_a_change_is_found_though_the_checksums_were_made_to_fit(run: Path) -> None:
    (run / "filtered/00000001_stats.json").write_text("{}")
    reseal(run)
    what = "its checksum is not that of the file that the run wrote"
    assert differences(run) == [Difference("filtered/00000001_stats.json", what)]


def test_malformed_checksums_are_named_by_line(run: Path) -> None:
    text = (run / "checksums.sha256").read_text()
    (run / "checksums.sha256").write_text(text + "what is this\n")
    assert said(run, "checksums.sha256") == [f"line {len(text.splitlines()) + 1} is malformed"]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("swap", "holds 000000002.jpg where 000000000.jpg is due"),
        ("lose", "holds nothing where "),
        ("add", "extra.jpg is of no kept row"),
    ],
)
def test_a_tar_with_other_samples_than_the_kept_ones_is_named(run: Path, change: str, expected: str) -> None:
    members = samples_in(run / TAR)
    if change == "swap":
        members = [*members[3:6], *members[:3], *members[6:]]
        expected = f"holds {members[0][0]} where {members[3][0]} is due"
    if change == "lose":
        expected = f"holds nothing where {members.pop()[0]} is due"
    if change == "add":
        members.append(("extra.jpg", b"mine"))
    rewrite(run / TAR, members)
    reseal(run)
    assert said(run, TAR)[-1].endswith(expected)


def test_a_missing_tar_is_seen_by_the_rows_that_are_left(run: Path) -> None:
    last = sorted(run.glob("filtered/*.tar"))[-1]
    rows = pq.read_metadata(last.with_suffix(".parquet")).num_rows
    last.unlink()
    reseal(run)
    assert Difference("filtered", f"{rows} kept rows are in no tar") in differences(run)
    (run / "filtered/00000001.tar").rename(run / "filtered/00000007.tar")
    assert "breaks the numbering: 00000001.tar is due" in said(run, "filtered/00000007.tar")


def test_a_sidecar_that_is_not_aligned_is_named(run: Path) -> None:
    side = run / "filtered/00000000.parquet"
    first, second = pq.read_table(side).to_pylist()[:2]
    edit(side, 0, uid=second["uid"])
    what = f"00000.tar {first['key']}: has {first['key']} {second['uid']} in its place"
    assert what in said(run, "filtered/00000000.parquet")
    edit(side, 0, uid=first["uid"], key="other")
    assert f"00000.tar {first['key']}: has other {first['uid']} in its place" in said(run, "filtered/00000000.parquet")


@pytest.mark.parametrize(
    ("kept", "change", "what"),
    [
        (True, {"reason": "low_score"}, "kept, but has a reason"),
        (True, {"threshold": 0.3}, "kept, but has a threshold"),
        (True, {"kept": False}, "dropped without a step"),
        (False, {"reason": None}, "dropped without a reason"),
        (False, {"problem": "empty"}, "a problem, or the step 00-read, without the other"),
        (False, {"step": "00-read"}, "a problem, or the step 00-read, without the other"),
        (True, {"key": "other"}, "uid or key are not those that were read"),
    ],
)
def test_a_decision_that_does_not_add_up_is_named_with_its_sample(
    run: Path, kept: bool, change: dict[str, object], what: str
) -> None:
    path = run / "decisions/00000000.parquet"
    rows = pq.read_table(path).to_pylist()
    at = next(i for i, row in enumerate(rows) if row["kept"] == kept and not row["problem"])
    edit(path, at, **change)
    reseal(run)
    key = change.get("key", rows[at]["key"])
    found = differences(run)
    assert what in [d.what for d in found if d.sample == f"{rows[at]['shard']} {key}"]


def test_counts_that_are_not_those_of_the_record_are_named(run: Path) -> None:
    path = run / "decisions/00000001.parquet"
    table = pq.read_table(path)
    pq.write_table(table.slice(1), path)
    rows = sum(pq.read_metadata(p).num_rows for p in run.glob("decisions/*"))
    found = [str(d) for d in differences(run)]
    assert any(line.startswith(f"decisions: {rows} rows, ") and line.endswith("kept") for line in found)
    assert any("rows of 00002.tar, but 17 were read" in line for line in found)


def test_a_step_that_drops_another_number_than_the_record_says_is_named(run: Path) -> None:
    path = run / "decisions/00000000.parquet"
    at = next(i for i, row in enumerate(pq.read_table(path).to_pylist()) if row["step"] == "02-cut")
    edit(path, at, step="01-filter")
    lines = said(run, "decisions")
    assert "01-filter dropped 1, run.json says 0" in lines
    assert any(line.startswith("02-cut dropped ") for line in lines)


def test_parquet_rows_that_are_not_the_kept_ones_are_named(run: Path) -> None:
    path = run / "parquet/00000000.parquet"
    table = pq.read_table(path)
    pq.write_table(table.slice(1), path)
    found = said(run, "parquet/00000000.parquet")
    assert any(f"00000.tar {table['key'][0]}: has 00000.tar {table['key'][1]}" in line for line in found)
    assert Difference("parquet", "1 kept rows are not in it") in differences(run)


def test_a_subset_that_is_not_the_kept_uids_in_order_is_named(run: Path) -> None:
    path = run / "subset.npy"
    whole = np.load(path)
    uids = [f"{a:016x}{b:016x}" for a, b in whole.tolist()]
    np.save(path, whole[1:])
    assert any(uids[0] and "kept, but its uid is not listed" in d.what for d in differences(run))
    np.save(path, np.concatenate([np.array([(0, 256)], SUBSET), whole]))
    assert f"{0:016x}{256:016x} is listed, but is not of a kept row" in said(run, "subset.npy")
    np.save(path, whole[::-1])
    assert "not in order, each uid once" in said(run, "subset.npy")
    np.save(path, np.concatenate([whole[:1], whole]))
    assert "not in order, each uid once" in said(run, "subset.npy")
    np.save(path, np.zeros(3))
    assert "of type float64, not u8,u8" in said(run, "subset.npy")
    path.write_bytes(b"garbage")
    assert any(line.startswith("not an array") for line in said(run, "subset.npy"))
    path.unlink()
    assert said(run, "subset.npy") == ["missing", "missing"]


def test_damage_in_the_store_is_named(run: Path) -> None:
    parts = sorted((run / "store/parts/judge").rglob("*-state-*"))
    flip(parts[0], 50)
    parts[1].unlink()
    names = [part.relative_to(run).as_posix() for part in parts]
    found = {str(d) for d in differences(run)}
    assert found == {f"{names[0]}: its bytes are not those of its receipt", f"{names[1]}: missing"}


def test_a_manifest_that_is_gone_or_damaged_is_named(run: Path) -> None:
    (manifest,) = (run / "store/manifests/decide").iterdir()
    manifest.write_bytes(b"garbage")
    path = manifest.relative_to(run / "store").as_posix()
    assert any(d.file == path and d.what.startswith("not a list of receipts") for d in differences(run))
    manifest.unlink()
    assert Difference(path, "not in the store") in differences(run)


def test_a_pool_that_changed_is_named(tmp_path: Path) -> None:
    run = webdataset_run(tmp_path)
    tar = tmp_path / "pool/00001.tar"
    name, body = samples_in(run / "filtered/00000001.tar")[0]
    data = tar.read_bytes()
    flip(tar, data.index(body))
    (found,) = differences(run)
    assert (found.sample or "").startswith("00001.tar ")
    assert found.what == f"{name} does not have the bytes that the pool has"
    tar.write_bytes(data[:2000])
    assert any(d.file == "pool" and "00001.tar: " in d.what for d in differences(run))
    tar.unlink()
    assert Difference("pool", "00001.tar is no longer there") in differences(run)
    shutil.rmtree(tmp_path / "pool")
    assert [d.file for d in differences(run)] == ["pool"]


def test_a_damaged_table_is_named_and_the_other_checks_go_on(run: Path) -> None:
    (run / "parquet/00000000.parquet").write_bytes(b"garbage")
    assert any(line.startswith("cannot be read") for line in said(run, "parquet/00000000.parquet"))
    pq.write_table(pa.table({"a": [1]}), run / "decisions/00000000.parquet")
    assert "no column duplicate_of" in said(run, "decisions/00000000.parquet")


def test_an_unfinished_run_is_a_difference_and_no_run_a_mistake(run: Path, tmp_path: Path) -> None:
    (run / "checksums.sha256").unlink()
    assert differences(run)[0] == Difference("checksums.sha256", "missing: the run is not finished")
    (run / "run.json").write_text("{")
    (found,) = differences(run)
    assert (found.file, found.what[:8]) == ("recipe.yaml or run.json", "damaged:")
    with pytest.raises(UserError, match="no finished run is here"):
        differences(tmp_path / "nothing")
