"""`python -m tests.cluster DIRECTORY MARKS`: units on a cluster that loses one of its two nodes and gets a new one.

Prints how often units were begun, and the digest of what was made.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pyarrow as pa
import ray
from ray.cluster_utils import Cluster

from pipeline.machine import Machine
from pipeline.parts import Dataset, given
from pipeline.ray_executor import RayExecutor
from pipeline.run import Run
from pipeline.stage import Function, Made, Rows
from pipeline.storage import Root

UNITS = 24


@dataclass(frozen=True)
class Slow:
    """Half a second of work on a number; leaves a mark in the machine's scratch folder when it begins.

    The second half of the numbers waits for `exchanged` beside that folder; a negative number never ends.
    """

    name: ClassVar[str] = "slow"
    version: ClassVar[int] = 1
    outputs: ClassVar[tuple[str, ...]] = ("rows",)
    exact: ClassVar[bool] = True

    def build(self, machine: Machine) -> Function:
        marks = Path(machine.scratch or "/nowhere")

        def work(rows: Rows) -> Made:
            number = rows.given["number"]
            (marks / f"{number}-{uuid.uuid4().hex}").touch()
            if number < 0:
                time.sleep(3600)
            while number >= UNITS // 2 and not (marks.parent / "exchanged").exists():
                time.sleep(0.1)
            time.sleep(0.5)
            return Made({"rows": pa.table({"number": [number] * 10})})

        return work


def numbers(count: int) -> Dataset:
    return given([{"number": number} for number in range(count)])


def begun(marks: Path) -> int:
    return len(list(marks.iterdir()))


def main(directory: str, marks: Path) -> None:
    store = 100 * 2**20
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": store})
    nodes = [cluster.add_node(num_cpus=1, object_store_memory=store) for _ in range(2)]
    ray.init(address=cluster.address, log_to_driver=False)

    machine = Machine(workers=2, scratch=str(marks))
    executor = RayExecutor(machine)
    run = Run(Root(f"{directory}/store"), Root(directory), executor, machine)
    with ThreadPoolExecutor(1) as thread:  # only the main thread may start and end nodes
        making = thread.submit(run.map, Slow(), numbers(UNITS))
        while begun(marks) < UNITS // 4:
            time.sleep(0.05)
        cluster.remove_node(nodes[0], allow_graceful=False)
        cluster.add_node(num_cpus=1, object_store_memory=store)
        (marks.parent / "exchanged").touch()
        made = making.result()["rows"]
    content = hashlib.sha256("".join(file.sha256 for part in made.parts for file in part.files).encode()).hexdigest()
    while sum(node["Alive"] for node in ray.nodes()) != 3:  # the cluster takes its time to believe it
        time.sleep(0.2)
    print(json.dumps({"begun": begun(marks), "content": content, "nodes": len(ray.nodes())}), flush=True)
    executor.close()
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    main(sys.argv[1], Path(sys.argv[2]))
