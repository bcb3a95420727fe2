"""random: keep samples by the lowest hash of their uid. The control that every other rule is measured against."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import pyarrow as pa
from pydantic.dataclasses import dataclass

from pipeline.arrow import hexes
from pipeline.exact import taken
from pipeline.machine import Machine
from pipeline.parts import given
from pipeline.quota import cut_of, exact_cut, keys_of, ranked
from pipeline.stage import Function, Made, Rows
from pipeline.state import alive, drop, made
from pipeline.step import RULE, Base, Keep, Outcome, Step, places_in
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
        drawn = step.run.map(Hash(step.seed, step.name), step.samples, step.state, step.places)["drawn"]
        cut = exact_cut(step.run, drawn, given([{"quota": [step.budget(self.keep, self.of)]}]), 64)
        state = step.run.map(Lot(step.number), step.state, drawn, cut.spread(len(drawn)), step.samples)["state"]
        return Outcome(state)


@dataclasses.dataclass(frozen=True)
class Hash:
    """Every survivor, ranked by hash(seed, step, uid)."""

    seed: int
    step: str

    name: ClassVar[str] = "random_hash"
    version: ClassVar[int] = 1
    outputs: ClassVar[tuple[str, ...]] = ("drawn",)
    exact: ClassVar[bool] = True

    def build(self, machine: Machine) -> Function:
        return self.hash

    def hash(self, samples: Rows, state: Rows, place: Rows) -> Made:
        at_M = np.flatnonzero(alive(state.table(["dropped_by"])))
        uid = samples.table(["uid"]).column("uid").combine_chunks().take(pa.array(at_M))
        bits_M = draw(self.seed, self.step, [h or "" for h in hexes(uid)])
        unit_N, row_N = places_in(samples, place)
        return Made({"drawn": ranked(at_M, np.zeros(len(at_M)), bits_M, uid, unit_N[at_M], row_N[at_M])})


@dataclasses.dataclass(frozen=True)
class Lot:
    """Drop what was not drawn."""

    number: int

    name: ClassVar[str] = "random_lot"
    version: ClassVar[int] = 1
    outputs: ClassVar[tuple[str, ...]] = ("state",)
    exact: ClassVar[bool] = True

    def build(self, machine: Machine) -> Function:
        return self.lot

    def lot(self, state: Rows, drawn: Rows, cut: Rows, samples: Rows) -> Made:
        before, table = state.table(), drawn.table()
        keep_N = np.zeros(before.num_rows, bool)
        keep_N[table.column("at").to_numpy()[taken(cut_of(cut), *keys_of(table))]] = True
        return made(before, drop(before, self.number, alive(before) & ~keep_N, "not_drawn"), samples.lengths)
