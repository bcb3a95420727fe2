"""random: keep samples by the lowest hash of their uid. The control that every other rule is measured against."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import pyarrow as pa
from pydantic.dataclasses import dataclass

from pipeline.arrow import hexes
from pipeline.machine import Machine
from pipeline.parts import given
from pipeline.quota import Ranks, cut_of, exact_cut, ranked, taken
from pipeline.stage import Function, Made, Rows
from pipeline.state import alive, drop
from pipeline.step import RULE, Base, Keep, Outcome, Step
from pipeline.vectors import draw


@dataclass(frozen=True, config=RULE)
class Random:
    """Keep so many survivors; the others are `not_drawn`.

    Attributes:
        keep: how many.
        of: what a fraction `keep` is of.
    """

    keep: Keep
    of: Base = "survivors"

    def uses_columns(self) -> dict[str, pa.DataType]:
        return {}

    def apply(self, step: Step) -> Outcome:
        drawn = step.run.map(Hash(step.seed, step.name), step.samples, step.state)["drawn"]
        quota = given([{"quota": [step.budget(self.keep, self.of)]}])
        cut, left = exact_cut(step.run, drawn, step.samples, step.places, quota, 64)
        inputs = step.state, drawn, cut.spread(len(drawn)), left, step.samples, step.places
        done = step.run.map(Lot(step.number), *inputs)
        return Outcome(done["state"], done["dropped"])


@dataclasses.dataclass(frozen=True)
class Hash:
    """Every survivor, ranked by hash(seed, step, uid)."""

    seed: int
    step: str

    name: ClassVar[str] = "random_hash"
    version: ClassVar[int] = 2
    outputs: ClassVar[tuple[str, ...]] = ("drawn",)
    exact: ClassVar[bool] = True

    def build(self, machine: Machine) -> Function:
        return self.hash

    def hash(self, samples: Rows, state: Rows) -> Made:
        in_N = alive(state.table(["dropped_by"]))
        uid = samples.table(["uid"]).column("uid").filter(pa.array(in_N))
        bits_N = np.zeros(len(in_N), np.uint64)
        bits_N[in_N] = draw(self.seed, self.step, [h or "" for h in hexes(uid)])
        return Made({"drawn": ranked(bits_N, in_N)})


@dataclasses.dataclass(frozen=True)
class Lot:
    """Drop what was not drawn."""

    number: int

    name: ClassVar[str] = "random_lot"
    version: ClassVar[int] = 3
    outputs: ClassVar[tuple[str, ...]] = ("state", "dropped")
    exact: ClassVar[bool] = True

    def build(self, machine: Machine) -> Function:
        return self.lot

    def lot(self, state: Rows, drawn: Rows, cut: Rows, left: Rows, samples: Rows, place: Rows) -> Made:
        before = state.table()
        keep_N = taken(cut_of(cut), Ranks.of(drawn.table()), left, samples, place)
        return drop(before, self.number, alive(before) & ~keep_N, samples.lengths, "not_drawn")
