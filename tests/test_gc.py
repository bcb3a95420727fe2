"""gc lists exactly what no kept run needs, and what it leaves is whole."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.gc import STALE_S, kept_runs, referred, stale, unreferred
from pipeline.machine import Machine
from pipeline.storage import Root
from pipeline.verify import verify
from tests.pools import webdataset_pool
from tests.runs import run_recipe, webdataset


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
