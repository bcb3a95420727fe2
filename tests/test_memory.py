"""The memory of a worker does not follow the length of its shard, and Ray's object store stays empty."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.memory import pool_of

ROOT = Path(__file__).parents[1]
BUDGET_MIB = 1536
"""Of one worker with the model `tiny`; torch and what open_clip imports take two thirds of it."""

SAMPLES = 300
GROWTH_MIB = 64
"""What nine times as many more may add: their rows, vectors and captions are held, and none of their images."""


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.goal("R14")
@pytest.mark.campaign
@pytest.mark.timeout(600)
def test_ten_times_the_shard_takes_the_same_memory_and_nothing_is_spilled(
    tmp_path: Path, record_property: pytest.RecordProperty
) -> None:
    found = []
    for count in (SAMPLES, 10 * SAMPLES):
        pool = pool_of(tmp_path / f"pool{count}", count)
        command = [sys.executable, "-m", "tests.memory", str(pool), str(tmp_path / f"run{count}")]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{"))))
        found[-1]["shard"] = (pool / "00000.tar").stat().st_size >> 20
    small, large = found
    record_property(
        "figure",
        f"shards of {small['shard']} and {large['shard']} MiB: worker {small['worker']} and {large['worker']} MiB, "
        f"driver {small['driver']} and {large['driver']} MiB; {large['spilled']} MiB spilled",
    )
    assert large["kept"] > 9 * small["kept"] > 0
    assert max(large["worker"], large["driver"]) <= BUDGET_MIB
    for process in ("worker", "driver"):
        assert large[process] - small[process] <= GROWTH_MIB, process
    assert (large["objects"], large["spilled"]) == (0, 0)
