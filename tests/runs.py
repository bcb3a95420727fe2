"""Finished runs of small pools, for the tests of what looks at a run."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from pipeline.curate import Curated, curate
from pipeline.executor import Serial
from pipeline.machine import Machine
from pipeline.recipe import recipe_of
from pipeline.run import Run
from pipeline.storage import Root
from pipeline.verify import CHECKSUMS, UNLISTED
from tests.pools import datacomp_pool, webdataset_pool

LIMITS = {"max_unreadable": 0.5}
SCORE = "column:clip_l14_similarity_score"


def webdataset(pool: Path, **write: Any) -> dict[str, Any]:
    """A recipe for a pool of tars: a filter and a cut by the pool's own score."""
    return {
        "pool": {"format": "webdataset", "path": str(pool)},
        "select": [{"filter": {"min_words": 3}}, {"cut": {"score": SCORE, "keep": 0.5}}],
        "write": {"samples_per_shard": 10, **write},
        "limits": LIMITS,
    }


def datacomp(pool: Path) -> dict[str, Any]:
    """A recipe with every rule that leaves evidence."""
    return {
        "pool": {"format": "datacomp", "path": str(pool)},
        "models": {"l14": {"image": "l14_img", "text": "l14_txt"}},
        "select": [
            {"filter": {"min_words": 3, "columns": {"clip_l14_similarity_score": {"min": 0.1}}}},
            {"dedup": {"space": "l14", "epsilon": 0.07}},
            {"cut": {"score": "l14", "keep": 0.8}},
            {"density": {"space": "l14", "clusters": 4, "keep": 0.5}},
            {"random": {"keep": 0.9}},
        ],
        "limits": LIMITS,
    }


def run_recipe(recipe: dict[str, Any], directory: str, store: str | None = None) -> Curated:
    """Curate in this process, two shards to a part."""
    run = Run(Root(store or f"{directory}/store"), Root(directory), Serial(), Machine())
    return curate(run, recipe_of(recipe), group_units=2)


def webdataset_run(folder: Path, **write: Any) -> Path:
    """folder/pool of three tars with 17 samples each, and its run in folder/run."""
    run_recipe(webdataset(webdataset_pool(folder / "pool", 3, 18, 1), **write), str(folder / "run"))
    return folder / "run"


def datacomp_run(folder: Path) -> Path:
    """folder/pool of three shards, and its run in folder/run."""
    run_recipe(datacomp(datacomp_pool(folder / "pool", 3, 60, 1)), str(folder / "run"))
    return folder / "run"


def reseal(run: Path) -> None:
    """Write checksums for what is there, as one who wants to hide a change would."""
    files = (path for path in sorted(run.rglob("*")) if path.is_file())
    names = {path.relative_to(run).as_posix(): path for path in files}
    lines = [
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {name}\n"
        for name, path in names.items()
        if not name.startswith("store/") and name not in UNLISTED
    ]
    (run / CHECKSUMS).write_text("".join(lines))
