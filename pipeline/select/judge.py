"""Rules that look at one row at a time: list and filter.

Such a rule is a frozen dataclass with `build(machine)` that gives a function of one unit's samples and columns to a
Verdict. Where such rules lead a recipe, the rows they drop are spared the embedding (embed.py calls the same function).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
import pyarrow as pa

from pipeline.arrow import valid
from pipeline.machine import Machine
from pipeline.stage import Function, Made, Rows
from pipeline.state import Verdict, alive, drop
from pipeline.step import Outcome, Step


class RowRule(Protocol):
    """The shape of a rule that judges rows one at a time."""

    @property
    def reads(self) -> Sequence[str]:
        """Columns of schema.SAMPLES that it looks at."""

    def uses_columns(self) -> dict[str, pa.DataType]:
        """Metadata columns of the pool that it looks at, and their type in the decisions."""

    def build(self, machine: Machine) -> Callable[[pa.Table, pa.Table], Verdict]:
        """Load what is needed once per worker."""


def judged(step: Step, rule: RowRule) -> Outcome:
    """What a row rule hands on."""
    done = step.run.map(Judge(step.number, rule), step.samples, step.columns, step.state)
    return Outcome(done["state"], done["dropped"])


@dataclass(frozen=True)
class Judge:
    """Drop the survivors of a group that a row rule gives a reason for."""

    number: int
    rule: Any

    name: ClassVar[str] = "judge"
    version: ClassVar[int] = 2
    outputs: ClassVar[tuple[str, ...]] = ("state", "dropped")
    exact: ClassVar[bool] = True

    def build(self, machine: Machine) -> Function:
        judge = self.rule.build(machine)

        def run(samples: Rows, columns: Rows, state: Rows) -> Made:
            before = state.table()
            seen = samples.pieces(self.rule.reads)
            if self.rule.uses_columns():
                verdicts = [judge(s, c) for s, c in zip(seen, columns.pieces(), strict=True)]
            else:
                verdicts = [judge(s, s.select([])) for s in seen]
            alive_N = alive(before)
            reason = pa.concat_arrays([v.reason for v in verdicts])
            drop_N = alive_N & valid(reason)
            value = pa.concat_arrays([v.value for v in verdicts])
            threshold = pa.concat_arrays([v.threshold for v in verdicts])
            why = (column.filter(pa.array(drop_N)) for column in (reason, value, threshold))
            done = drop(before, self.number, drop_N, samples.lengths, *why)
            done.facts["overlap"] = overlap(verdicts, alive_N)
            return done

        return run


def overlap(verdicts: list[Verdict], alive_N: np.ndarray) -> dict[str, int]:
    """How many survivors fail each combination of a rule's conditions: `min_words+max_aspect` -> rows."""
    names = list(dict.fromkeys(name for v in verdicts for name in v.failing))
    if not names:
        return {}
    failing_NC = np.stack([np.concatenate([v.failing[name] for v in verdicts]) for name in names], axis=1)[alive_N]
    sets, counts = np.unique(failing_NC, axis=0, return_counts=True)
    found = Counter(
        {"+".join(n for n, f in zip(names, row, strict=True) if f): int(c) for row, c in zip(sets, counts, strict=True)}
    )
    del found[""]
    return dict(sorted(found.items()))
