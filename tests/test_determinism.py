"""The same bytes however the work is spread; and a finished run is found again without looking at its parts."""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.curate import curate
from pipeline.executor import Executor, Failure, Serial, Worker
from pipeline.machine import Machine
from pipeline.recipe import recipe_of
from pipeline.run import Run
from pipeline.stage import Source, Unit
from pipeline.storage import Root
from tests.faulty import FaultyMemory, Plan, faulty_memory
from tests.pools import datacomp_pool, webdataset_pool
from tests.runs import datacomp, webdataset
from tests.toy_stages import Lines, Times
from tests.trees import tree

pytestmark = pytest.mark.slow


class Shuffled(Serial):
    """All tasks of a call in an order drawn by lot."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._chance = random.Random(seed)

    def each(self, worker: Worker, tasks: Iterable[Any], gpu: bool = False) -> Iterator[tuple[int, Any | Failure]]:
        numbered = list(enumerate(tasks))
        self._chance.shuffle(numbered)
        for position, task in numbered:
            ((_, result),) = super().each(worker, [task], gpu)
            yield position, result


def written(recipe: dict[str, Any], directory: Path, executor: Executor, machine: Machine) -> dict[str, bytes]:
    try:
        run = Run(Root(f"{directory}/store"), Root(str(directory)), executor, machine)
        curate(run, recipe_of(recipe), group_units=4)
    finally:
        executor.close()
    return tree(directory)


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return datacomp_pool(tmp_path_factory.mktemp("pool"), 9, 30, 1)


@pytest.fixture(scope="module")
def serial(pool: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return written(datacomp(pool), tmp_path_factory.mktemp("serial"), Serial(), Machine())


@pytest.mark.goal("R2")
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_units_in_any_order_give_the_same_bytes(
    pool: Path, serial: dict[str, bytes], tmp_path: Path, seed: int, record_property: pytest.RecordProperty
) -> None:
    assert written(datacomp(pool), tmp_path, Shuffled(seed), Machine()) == serial
    record_property("figure", f"order {seed} of the units: {len(serial)} files equal")


@pytest.mark.ray
@pytest.mark.goal("R2")
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_any_number_of_workers_on_ray_gives_the_bytes_of_a_serial_run(
    pool: Path, serial: dict[str, bytes], tmp_path: Path, workers: int, record_property: pytest.RecordProperty
) -> None:
    from pipeline.ray_executor import RayExecutor

    machine = Machine(workers=workers)
    assert written(datacomp(pool), tmp_path, RayExecutor(machine), machine) == serial
    record_property("figure", f"Ray, {workers} workers: {len(serial)} files equal")


@pytest.mark.goal("R2")
def test_decoding_ahead_changes_nothing(tmp_path: Path, record_property: pytest.RecordProperty) -> None:
    recipe = webdataset(webdataset_pool(tmp_path / "pool", 3, 20, 1)) | {"models": {"small": {"weights": "tiny"}}}
    recipe["select"] = [{"cut": {"score": "small", "keep": 0.7}}, {"dedup": {"space": "small", "epsilon": 0.05}}]
    found = [written(recipe, tmp_path / f"run{n}", Serial(), Machine(decoders=n, image_batch=8)) for n in (0, 2)]
    assert found[0] == found[1]
    record_property("figure", f"decoders 0 and 2, a model over images: {len(found[0])} files equal")


@pytest.fixture
def memory() -> Iterator[type[FaultyMemory]]:
    with faulty_memory() as memory:
        yield memory


@pytest.mark.goal("R9")
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("units", [300, pytest.param(10_000, marks=pytest.mark.campaign)])
def test_a_finished_run_is_found_again_without_reading_parts_or_pool(
    memory: type[FaultyMemory], tmp_path: Path, units: int, record_property: pytest.RecordProperty
) -> None:
    pool = []
    for number in range(units):
        path = tmp_path / f"{number:05d}.txt"
        path.write_text(f"{number}\n{number + 1}\n")
        pool.append(Unit(path.name, {"text": Source(str(path), path.stat().st_size, "")}))

    def run() -> list[Any]:
        memory.plan = Plan()
        new = Run(Root("memory://store"), Root("memory://run"), Serial(), Machine())
        numbers = new.read(Lines(), pool)["numbers"]
        return [numbers, new.map(Times(3), numbers)["products"]]

    made = run()
    for unit in pool:
        Path(unit.sources["text"].url).unlink()
    began = time.monotonic()
    assert run() == made
    seconds = time.monotonic() - began
    calls = {operation: len(paths) for operation, paths in memory.plan.seen.items()}
    assert [path for paths in memory.plan.seen.values() for path in paths if "/parts/" in path] == []
    assert sum(calls.values()) <= units / 1000 + 20, calls
    record_property(
        "figure", f"{units:,} units, 2 stages, again: {sum(calls.values())} calls, 0 to parts or pool, {seconds:.1f} s"
    )


@pytest.mark.goal("R9")
def test_finding_a_finished_run_again_does_not_cost_more_for_more_units(
    tmp_path: Path, record_property: pytest.RecordProperty
) -> None:
    costs = []
    for shards in (4, 12):
        with faulty_memory() as memory:
            for path in datacomp_pool(tmp_path / f"{shards}", shards, 25, 1).iterdir():
                memory().pipe_file(f"/pool/{path.name}", path.read_bytes())
            recipe = datacomp(tmp_path) | {"pool": {"format": "datacomp", "path": "memory://pool"}}
            for _ in range(2):
                memory.plan = Plan()
                run = Run(Root("memory://run/store"), Root("memory://run"), Serial(), Machine())
                curate(run, recipe_of(recipe), group_units=16)
            costs.append({operation: len(paths) for operation, paths in memory.plan.seen.items()})
    assert costs[0] == costs[1]
    record_property("figure", f"the whole path again, 4 or 12 shards: {sum(costs[0].values())} calls either way")
