"""verify finds one flipped byte, one lost file and one foreign file, of every kind that a run writes or refers to."""

from __future__ import annotations

import re
import shutil
import tarfile
from pathlib import Path

import pytest

from pipeline.formats.tar import END, member_header, padding
from pipeline.machine import Machine
from pipeline.storage import Root
from pipeline.verify import CHECKSUMS, UNLISTED, verify
from tests.pools import webdataset_pool
from tests.runs import reseal, run_recipe

RECIPE = {
    "models": {"tiny": {"weights": "tiny"}},
    "select": [
        {"filter": {"min_words": 3}},
        {"dedup": {"space": "tiny", "epsilon": 0.07}},
        {"cut": {"score": "tiny", "keep": 0.9}},
        {"density": {"space": "tiny", "clusters": 2, "keep": 0.9}},
        {"random": {"keep": 0.9}},
    ],
    "write": {"samples_per_shard": 10, "formats": ["webdataset", "parquet", "subset"]},
    "limits": {"max_unreadable": 1},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with every rule, every output format, and a store in its directory."""
    folder = tmp_path_factory.mktemp("everything")
    pool = {"format": "webdataset", "path": str(webdataset_pool(folder / "pool", 3, 12, 1))}
    run_recipe(RECIPE | {"pool": pool}, str(folder / "run"))
    return folder / "run"


def kinds(run: Path) -> dict[str, Path]:
    """One file of each kind: a path with its digits and digests left out -> the file."""
    found: dict[str, Path] = {}
    for path in sorted(run.rglob("*")):
        name = path.relative_to(run).as_posix()
        is_covered = not name.startswith("store/") or name.startswith(("store/parts/", "store/manifests/"))
        if path.is_file() and is_covered and name not in (*UNLISTED, CHECKSUMS):
            kind = re.sub(r"/[0-9a-f]{2}/[0-9a-f]{32}-(\w+)-[0-9a-f]{16}", r"/\1", name)
            found.setdefault(re.sub(r"[0-9a-f]{32}|\d{8}", "N", kind), path)
    return found


def told(run: Path) -> list[str]:
    return [difference.file for difference in verify(Root(str(run)), Root(f"{run}/store"), Machine())]


def is_named(run: Path, path: Path) -> bool:
    """Whether verify names a file, or for the record of the run that it is damaged."""
    name = path.relative_to(run).as_posix()
    return any(name in said or said in name for said in told(run))


def test_the_run_has_every_kind_of_file(run: Path) -> None:
    found = kinds(run)
    assert len(found) > 40
    assert {
        "filtered/N.tar",
        "filtered/N.parquet",
        "filtered/N_stats.json",
        "subset.npy",
        "run.json",
        "recipe.yaml",
    } <= {*found}
    assert {"decisions/N.parquet", "problems/N.parquet", "report/index.html", "select/03-cut/cut.json"} <= {*found}
    assert {"store/parts/read/samples", "store/parts/embed/vectors", "store/manifests/read/N.parquet"} <= {*found}
    assert told(run) == []


def test_a_flipped_byte_of_every_kind_of_file_is_named(run: Path) -> None:
    missed = []
    for kind, path in kinds(run).items():
        whole = path.read_bytes()
        at = len(whole) // 2
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        if not is_named(run, path):
            missed.append(kind)
        path.write_bytes(whole)
    assert missed == []
    assert told(run) == []


def test_a_lost_file_of_every_kind_is_named(run: Path) -> None:
    missed = []
    for kind, path in kinds(run).items():
        if path.name in ("recipe.yaml", "run.json"):
            continue  # without them there is no finished run: a mistake of the user
        whole = path.read_bytes()
        path.unlink()
        if not is_named(run, path):
            missed.append(kind)
        path.write_bytes(whole)
    assert missed == []


def test_a_foreign_file_in_every_folder_is_named(run: Path) -> None:
    folders = [run, *(path for path in run.rglob("*") if path.is_dir() and "store" not in path.parts)]
    strays = [folder / "00000099.parquet" for folder in folders]
    for stray in strays:
        stray.write_bytes(b"")
    found = told(run)
    for stray in strays:
        stray.unlink()
    assert {stray.relative_to(run).as_posix() for stray in strays} <= set(found)
    assert len(strays) > 8


def test_a_sample_missing_from_a_tar_is_named_though_all_digests_were_made_to_fit(run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    tar = copy / "filtered/00000000.tar"
    with tarfile.open(tar) as file:
        members = [(member.name, file.extractfile(member).read()) for member in file]  # type: ignore[union-attr]
    lost = members[0][0].partition(".")[0]
    kept = [(name, data) for name, data in members if name.partition(".")[0] != lost]
    tar.write_bytes(b"".join(member_header(n, len(d)) + d + padding(len(d)) for n, d in kept) + END)
    reseal(copy)
    differences = list(verify(Root(str(copy)), Root(f"{copy}/store"), Machine()))
    assert any(d.file == "filtered/00000000.tar" and d.sample and d.sample.endswith(lost) for d in differences)
