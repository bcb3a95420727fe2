"""gc lists exactly what no kept run needs, and what it leaves is whole."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest

from jobs import cli
from pipeline.errors import UserError
from pipeline.gc import STALE_S, kept_runs, referred, stale, unreferred
from pipeline.machine import Machine
from pipeline.storage import Root
from pipeline.verify import verify
from tests.pools import webdataset_pool
from tests.runs import run_recipe, webdataset
from tests.trees import tree


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """Two runs, `half` and `fifth`, that share tmp_path/store."""
    recipe = webdataset(webdataset_pool(tmp_path / "pool", 3, 9, 1))
    for name, keep in (("half", 0.5), ("fifth", 0.2)):
        recipe["select"][1]["cut"]["keep"] = keep
        run_recipe(recipe, str(tmp_path / name), str(tmp_path / "store"))
    return tmp_path


def listed(folder: Path, *keep: str) -> list[str]:
    store = Root(str(folder / "store"))
    runs = kept_runs(store, [Root(str(folder / name)) for name in keep], {})
    return [file.path for file in unreferred(store, referred(store, runs), time.time())]


def test_what_any_kept_run_uses_is_not_listed(shared: Path) -> None:
    assert listed(shared, "half", "fifth") == []


def test_what_only_another_run_uses_is_listed_names_first_and_bytes_last(shared: Path) -> None:
    found = listed(shared, "half")
    folders = [path.partition("/")[0] for path in found]
    assert sorted(set(folders), key=folders.index) == ["manifests", "receipts", "parts"]
    assert folders == sorted(folders, key=["manifests", "receipts", "parts"].index)
    assert not any(path.startswith(("parts/read", "receipts/read")) for path in found)
    store = Root(str(shared / "store"))
    for path in found:
        store.delete(path)
    assert list(verify(Root(str(shared / "half")), store, Machine())) == []
    assert list(verify(Root(str(shared / "fifth")), store, Machine())) != []
    assert listed(shared, "half") == []


@pytest.mark.parametrize("stop", [1, 3, 10, 20])
def test_a_stop_in_the_middle_leaves_no_receipt_without_its_part(shared: Path, stop: int) -> None:
    store = Root(str(shared / "store"))
    for path in listed(shared, "half")[:stop]:
        store.delete(path)
    assert list(verify(Root(str(shared / "half")), store, Machine())) == []
    recipe = webdataset(shared / "pool")
    recipe["select"][1]["cut"]["keep"] = 0.2
    shutil.rmtree(shared / "fifth")
    run_recipe(recipe, str(shared / "fifth"), str(shared / "store"))
    assert list(verify(Root(str(shared / "fifth")), store, Machine())) == []


def test_a_store_in_a_run_directory_keeps_that_run(tmp_path: Path) -> None:
    run_recipe(webdataset(webdataset_pool(tmp_path / "pool", 2, 9, 1)), str(tmp_path / "run"))
    assert listed(tmp_path / "run") == []
    store = Root(str(tmp_path / "run/store"))
    assert [root.url for root in kept_runs(store, [], {})] == [str(tmp_path / "run")]
    store.write("parts/judge/garbage", b"not ours")
    store.write("segments/judge/garbage.parquet", b"not ours")
    store.write("listed/aa/garbage.json", b"not ours")
    store.write("listed/aa/other.json", b'["' + b"f" * 32 + b'"]')
    store.write("notes.txt", b"the user's")
    garbage = ["segments/judge/garbage.parquet", "listed/aa/garbage.json", "listed/aa/other.json"]
    assert listed(tmp_path / "run") == [*garbage, "parts/judge/garbage"]


@pytest.mark.goal("R10")
def test_what_nobody_committed_is_never_read_and_listed_as_such(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], record_property: pytest.RecordProperty
) -> None:
    recipe = webdataset(webdataset_pool(tmp_path / "pool", 3, 9, 1))
    run, store = tmp_path / "run", tmp_path / "run/store"
    run_recipe(recipe, str(run))
    before = tree(run)
    strays = {"parts/read/00/.tmp-stale": b"PAR1 half written", "parts/times/aa/foreign.parquet": b"garbage"}
    for stage in (path.name for path in (store / "parts").iterdir()):
        folder, part = next((p.parent, p) for p in sorted((store / "parts" / stage).rglob("*")) if p.is_file())
        strays[(folder / f"{'0' * 32}-torn.parquet").relative_to(store).as_posix()] = part.read_bytes()[:-9]
        strays[(folder / f"{'1' * 32}-whole.parquet").relative_to(store).as_posix()] = part.read_bytes()
    for stage in (path.name for path in (store / "receipts").iterdir()):
        for name, data in (("torn", b'{"key": "'), ("empty", b""), ("binary", b"\xff\0")):
            strays[f"receipts/{stage}/00/{name}.json"] = data
        strays[f"manifests/{stage}/{'2' * 32}.parquet"] = b"PAR1"
        strays[f"segments/{stage}/{'3' * 32}.parquet"] = b"not a list of receipts"
    for name, data in strays.items():
        (store / name).parent.mkdir(parents=True, exist_ok=True)
        (store / name).write_bytes(data)
    old = time.time() - STALE_S - 1
    os.utime(store / "parts/read/00/.tmp-stale", (old, old))
    in_run = ["decisions/00000099.parquet", "filtered/00000099.tar"]
    for name in in_run:
        (run / name).write_bytes(b"garbage")
    told = {difference.file for difference in verify(Root(str(run)), Root(str(store)), Machine())}
    assert set(in_run) <= told
    (run / "decisions/.tmp-killed").write_bytes(b"half written")

    recipe["select"][1]["cut"]["keep"] = 0.4  # misses parts, so that every record is looked for
    run_recipe(recipe, str(run))
    recipe["select"][1]["cut"]["keep"] = 0.5
    run_recipe(recipe, str(run))
    assert tree(run) == before
    assert cli.main(["gc", str(store)]) == 0
    listed = set(capsys.readouterr().out.splitlines())
    assert strays.keys() <= listed
    assert all((store / name).read_bytes() == data for name, data in strays.items()), "gc only lists"
    record_property(
        "figure",
        f"{len(strays)} torn, stale and foreign files in a store: the same {len(before)} files, all listed by gc; "
        f"{len(in_run)} in a run directory: named by verify, removed by the next run",
    )


def test_without_a_kept_run_everything_is_listed(shared: Path) -> None:
    files = Root(str(shared / "store")).list()
    assert sorted(listed(shared)) == sorted(files)


def test_an_unfinished_run_cannot_be_kept(shared: Path) -> None:
    (shared / "half/checksums.sha256").unlink()
    with pytest.raises(UserError, match="half: this run is not finished, so what it needs is not known"):
        listed(shared, "half", "fifth")


def test_a_run_of_another_store_cannot_be_kept(shared: Path, tmp_path: Path) -> None:
    run_recipe(webdataset(shared / "pool"), str(tmp_path / "other"), str(tmp_path / "elsewhere"))
    shutil.rmtree(shared / "store/manifests/read")
    with pytest.raises(UserError, match=r"half: it refers to manifests/read/.*, which is not in .*store"):
        listed(shared, "half")


def test_temporary_files_are_listed_when_they_are_a_day_old(tmp_path: Path) -> None:
    old, new = tmp_path / "parts/read/.tmp-old", tmp_path / "parts/read/.tmp-new"
    old.parent.mkdir(parents=True)
    for path in (old, new):
        path.write_bytes(b"half")
    now = time.time()
    os.utime(old, (now - STALE_S - 1, now - STALE_S - 1))
    assert [file.path for file in stale(Root(str(tmp_path)), now)] == ["parts/read/.tmp-old"]
    assert list(stale(Root("memory://store"), now)) == []
