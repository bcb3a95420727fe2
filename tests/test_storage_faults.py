"""Operation x fault x first calls over a whole run: the same bytes, or an error that names the place; never a third."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.curate import curate
from pipeline.errors import PairsieveError
from pipeline.executor import Serial
from pipeline.machine import Machine
from pipeline.recipe import recipe_of
from pipeline.run import Run
from pipeline.storage import Root
from tests.faulty import FAULTS, FaultyMemory, Plan, faulty_memory
from tests.pools import datacomp_pool
from tests.runs import datacomp
from tests.trees import comparable

POOL, RUN = "/pool/", "/run/"
FOLDERS = (
    "store/parts",
    "store/receipts",
    "store/manifests",
    "store/listed",
    "decisions",
    "select",
    "recipe",
    "sha256",
)
RECIPE = datacomp(Path("pool")) | {"pool": {"format": "datacomp", "path": "memory://pool"}}
RECIPE["select"] = RECIPE["select"][:2]

PASSES = {
    "connection reset",
    "slow down",
    "internal error",
    "latency",
    "done twice",
    "lost acknowledgement",
    "short read",
    "short write",
}
"""Faults that no run may be given up for."""


@pytest.fixture(scope="module")
def memory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[type[FaultyMemory]]:
    folder = datacomp_pool(tmp_path_factory.mktemp("pool"), 2, 40, 1)
    with faulty_memory() as memory:
        for path in folder.iterdir():
            memory().pipe_file(f"{POOL}{path.name}", path.read_bytes())
        yield memory


@pytest.fixture(scope="module")
def clean(memory: type[FaultyMemory]) -> tuple[dict[str, bytes], Plan]:
    """What a run without faults writes, and the calls it makes."""
    return finished(memory, Plan()), memory.plan


def finished(memory: type[FaultyMemory], plan: Plan) -> dict[str, bytes]:
    """Run in what is there under a plan; the files of the run directory that have to be equal."""
    memory.plan = plan
    run = Run(Root("memory://run/store"), Root("memory://run"), Serial(), Machine())
    curate(run, recipe_of(RECIPE), group_units=1)
    files = {name.removeprefix(RUN): file.getvalue() for name, file in memory.store.items() if name.startswith(RUN)}
    return comparable(files)


def forget(memory: type[FaultyMemory]) -> None:
    for name in [name for name in memory.store if name.startswith(RUN)]:
        del memory.store[name]


def differing(found: dict[str, bytes], clean: dict[str, bytes]) -> list[str]:
    """Names of files that are not the same, or only in one of the two."""
    return sorted(name for name in found.keys() | clean.keys() if found.get(name) != clean.get(name))


def outcome(memory: type[FaultyMemory], clean: dict[str, bytes], plan: Plan) -> str:
    """`same` or `error` under a plan in an empty directory; then the same bytes from what it left."""
    forget(memory)
    try:
        assert not differing(finished(memory, plan), clean), f"other bytes without an error: {plan}"
        ended = "same"
    except (PairsieveError, OSError) as error:
        shards = [name.removeprefix(POOL) for name in memory.store if name.startswith(POOL)]
        names = [*shards, "memory://", *(name.partition("/")[0] for name in clean)]
        assert any(name in str(error) for name in names), f"names no place: {error!r} of {plan}"
        ended = "error"
    assert not differing(finished(memory, Plan()), clean), f"the run after {plan} gave other bytes"
    return ended


def plans(clean: Plan, calls: int, places: tuple[str, ...]) -> Iterator[Plan]:
    """All that can befall the first calls of each operation that a run makes, in each place."""
    for fault, operations in FAULTS.items():
        for operation in operations:
            for place in places:
                there = sum(place in path for path in clean.seen.get(operation, []))
                for call in range(1, min(calls, there) + 1):
                    yield Plan(operation, fault, call, place)


@pytest.mark.slow
@pytest.mark.goal("R5")
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("calls", "places"),
    [
        (1, (RUN, POOL)),
        pytest.param(3, (RUN, POOL), marks=pytest.mark.campaign),
        pytest.param(1, FOLDERS, marks=pytest.mark.campaign),
    ],
    ids=["first", "first three", "first in each folder"],
)
def test_a_fault_of_storage_ends_in_the_same_bytes_or_names_the_place(
    memory: type[FaultyMemory],
    clean: tuple[dict[str, bytes], Plan],
    calls: int,
    places: tuple[str, ...],
    record_property: pytest.RecordProperty,
) -> None:
    files, asked = clean
    ended: dict[str, int] = {"same": 0, "error": 0}
    for plan in plans(asked, calls, places):
        result = outcome(memory, files, plan)
        assert plan.done, f"never happened: {plan}"
        assert result == "same" or plan.fault not in PASSES, f"{plan} passes, but the run was given up"
        ended[result] += 1
    assert min(ended.values()) > 0
    record_property(
        "figure",
        f"{sum(ended.values())} faults: {ended['same']} ended in the same bytes, {ended['error']} named, 0 else",
    )
