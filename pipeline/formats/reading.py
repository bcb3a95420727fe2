"""What every pool format gives for one unit: three tables, the first two with one row per listed sample."""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa


@dataclass(frozen=True)
class Reading:
    """One unit as listed.

    Attributes:
        samples: schema.SAMPLES, in the order of the shard.
        columns: the pool's own metadata in its own Arrow types, aligned with `samples`; null where a row has none.
        problems: schema.PROBLEMS: one line per sample with a problem, and one per damage of the shard itself.
    """

    samples: pa.Table
    columns: pa.Table
    problems: pa.Table
