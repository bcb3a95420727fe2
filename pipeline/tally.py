"""What the report counts: the decisions and assignments of a finished run in, figures and chosen rows out.

One pass over the parts, a batch at a time; what is kept of it is bounded, whatever the number of rows. A row is known
by its ordinal in the pool.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.decide import READ
from pipeline.record import Record, Unreadable, batches, decisions_of, parts_of
from pipeline.select.cut import Cut
from pipeline.select.density import Density
from pipeline.storage import Root
from pipeline.vectors import from_ordered_bits, ordered_bits

NEAR, PAIRS, CONCEPTS, TYPICAL = 8, 8, 6, 6
"""Rows shown: on each side of a threshold; duplicate pairs; clusters of each kind; members of each cluster."""

DRAWN_ROWS = 1 << 20
"""Most rows that the random control looks at; of a larger pool, every so-manieth row."""

FINE_BITS = 20
"""Leading bits of a float32 score that tell apart the fine bins of a histogram: steps of 0.05 % of the value."""

ASSIGNED = {"dedup": ("max_cosine", "duplicate_of"), "density": ("cluster", "distance")}
"""Columns of select/NN-NAME/assign that are looked at, by rule."""

DECIDED = ("uid", "step", "reason", "value", "threshold")
"""Columns of decisions that are, beside the scores."""

CANDIDATES = pa.schema(
    [
        ("rank", pa.float64()),
        ("row", pa.int64()),
        ("value", pa.float64()),
        ("threshold", pa.float64()),
        ("kept", pa.bool_()),
        ("of", pa.string()),  # duplicate_of, or the reason of a filter
        ("cluster", pa.int32()),
    ]
)
"""Rows that may be shown; the lowest `rank` wins, then the earlier row."""


@dataclass
class Score:
    """Finely binned scores of the rows that entered a cut, and of those that it kept."""

    name: str
    threshold: float | None
    before: np.ndarray = field(default_factory=lambda: np.zeros(1 << FINE_BITS, np.int64))
    after: np.ndarray = field(default_factory=lambda: np.zeros(1 << FINE_BITS, np.int64))

    def histogram(self, bins: int) -> dict[str, Any]:
        """`low` and `high` of the values that occur, and the rows in each of `bins` equal intervals between them."""
        live = np.flatnonzero(self.before)
        value = from_ordered_bits(live.astype(np.uint32) << np.uint32(32 - FINE_BITS)).astype(np.float64)
        low, high = (float(value[0]), float(value[-1])) if len(live) else (0.0, 1.0)
        high = high if high > low else low + 1.0
        at = np.minimum(((value - low) / (high - low) * bins).astype(np.int64), bins - 1)
        counts = [np.bincount(at, c[live], bins).astype(np.int64).tolist() for c in (self.before, self.after)]
        return {"score": self.name, "low": low, "high": high, "before": counts[0], "after": counts[1]}


@dataclass
class Concepts:
    """What a density step says of its clusters.

    Attributes:
        table: clusters.parquet.
        pick: the rule's.
        largest, pruned: the clusters that are shown: of most members; of the least kept share among the others.
        typical: of each shown cluster, the rows nearest to its centroid.
        last_kept, first_dropped: of each cluster, the rows on both sides of its threshold.
        spoken_row, spoken_cluster: rows whose captions are counted, and their cluster, batch by batch.
    """

    table: pa.Table
    pick: str
    largest: list[int]
    pruned: list[int]
    typical: dict[int, pa.Table] = field(default_factory=dict)
    last_kept: pa.Table = field(default_factory=CANDIDATES.empty_table)
    first_dropped: pa.Table = field(default_factory=CANDIDATES.empty_table)
    spoken_row: list[np.ndarray] = field(default_factory=list)
    spoken_cluster: list[np.ndarray] = field(default_factory=list)

    @property
    def shown(self) -> list[int]:
        return [*self.largest, *self.pruned]

    @property
    def spoken(self) -> tuple[np.ndarray, np.ndarray]:
        """Row and cluster of the rows whose captions are counted."""
        empty = np.zeros(0, np.int64)
        return np.concatenate([empty, *self.spoken_row]), np.concatenate([empty, *self.spoken_cluster])


@dataclass
class StepTally:
    """What was seen of one step."""

    number: int
    name: str
    rule_name: str
    rule: Any
    score: Score | None = None
    concepts: Concepts | None = None
    near_kept: pa.Table = field(default_factory=CANDIDATES.empty_table)
    near_dropped: pa.Table = field(default_factory=CANDIDATES.empty_table)
    by_reason: dict[str, pa.Table] = field(default_factory=dict)
    pairs: pa.Table = field(default_factory=CANDIDATES.empty_table)
    overlap: dict[str, int] = field(default_factory=dict)


@dataclass
class Drawn:
    """Rows for the random control: every `stride`-th of the pool.

    Attributes:
        number: int64 (N,), the step that dropped the row, from 0 for 00-read; steps + 1 for kept rows.
        uid: (N,) 32 hex digits.
        scores: name -> float64 (N,), NaN without.
        clusters: step -> int64 (N,), -1 for rows that did not enter it.
    """

    stride: int
    number: np.ndarray
    uid: list[str]
    scores: dict[str, np.ndarray]
    clusters: dict[str, np.ndarray]


@dataclass
class Tally:
    """Everything that one pass over a run directory gave."""

    steps: list[StepTally]
    drawn: Drawn


@dataclass
class Batch:
    """Some consecutive rows of the decisions."""

    row: np.ndarray
    number: np.ndarray
    table: pa.Table

    def numbers(self, name: str) -> np.ndarray:
        """A float column, NaN for null."""
        return np.asarray(self.table.column(name).to_numpy(), np.float64)


def tally(directory: Root, record: Record, listed: int, spoken: Sequence[range]) -> Tally:
    """Go once through decisions/ and select/.

    Args:
        directory: the run directory.
        record: of the run.
        listed: rows of the pool.
        spoken: rows whose captions will be counted, as ranges of ordinals in order.

    Raises:
        Unreadable: a part is missing or damaged.
    """
    steps = [_begin(directory, at, name, rule) for at, (name, rule) in enumerate(record.recipe.select, 1)]
    feeds = {
        s.name: _Feed(directory, f"select/{s.name}/assign", ASSIGNED[s.rule_name])
        for s in steps
        if s.rule_name in ASSIGNED
    }
    edges = np.array([[r.start, r.stop] for r in spoken], np.int64).reshape(-1)
    stride = max(1, -(-listed // DRAWN_ROWS))
    pieces: list[tuple[np.ndarray, list[str], dict[str, np.ndarray], dict[str, np.ndarray]]] = []
    numbers = [name for name, kind in record.recipe.used_columns.items() if kind == pa.float64()]
    scores = [*(f"score_{name}" for name in record.recipe.scored), *numbers]
    for batch in _decisions(directory, [s.name for s in steps], scores):
        clusters = {}
        for step in steps:
            entered = batch.number >= step.number
            assigned = feeds[step.name].take(int(entered.sum())) if step.name in feeds else None
            _see(step, steps, batch, entered, assigned)
            if step.concepts:
                cluster = np.full(len(batch.row), -1, np.int64)
                if assigned is not None:
                    cluster[entered] = assigned.column("cluster").to_numpy()
                clusters[step.name] = cluster
                heard = entered & (np.searchsorted(edges, batch.row, side="right") % 2 == 1)
                step.concepts.spoken_row.append(batch.row[heard])
                step.concepts.spoken_cluster.append(cluster[heard])
        mine = np.flatnonzero(batch.row % stride == 0)
        uid = batch.table.column("uid").take(pa.array(mine)).to_pylist()
        values = {name: batch.numbers(name)[mine] for name in scores}
        pieces.append((batch.number[mine], uid, values, {n: c[mine] for n, c in clusters.items()}))
    return Tally(steps, _drawn(stride, pieces, scores, [s.name for s in steps if s.concepts]))


def _begin(directory: Root, number: int, rule_name: str, rule: Any) -> StepTally:
    step = StepTally(number, f"{number:02d}-{rule_name}", rule_name, rule)
    if isinstance(rule, Cut):
        threshold = json.loads(directory.read(f"select/{step.name}/cut.json"))["threshold"]
        step.score = Score(rule.column or f"score_{rule.score}", threshold)
    if isinstance(rule, Density):
        table = pq.read_table(pa.BufferReader(directory.read(f"select/{step.name}/clusters.parquet")))
        size, quota = (table.column(n).to_numpy() for n in ("size", "quota"))
        live = np.flatnonzero(size)
        by_size = live[np.lexsort((live, -size[live]))]
        share = quota[live] / size[live]
        by_share = live[np.lexsort((live, -size[live], share))][: int((share < 1).sum())].tolist()
        largest = by_size[:CONCEPTS].tolist()
        pruned = [cluster for cluster in by_share[: 2 * CONCEPTS] if cluster not in largest]
        step.concepts = Concepts(table, rule.pick, largest, pruned[:CONCEPTS])
    return step


def _decisions(directory: Root, steps: Sequence[str], scores: Sequence[str]) -> Iterator[Batch]:
    names = pa.array([READ, *steps])
    first = 0
    for path in decisions_of(directory):
        for table in batches(directory, path, [*DECIDED, *scores]):
            number = pc.fill_null(pc.index_in(table.column("step"), names), len(names))
            yield Batch(np.arange(first, first + len(table)), number.to_numpy().astype(np.int64), table)
            first += len(table)


class _Feed:
    """The rows of an assignment, as many at a time as asked for: they follow the decisions of the rows that entered."""

    def __init__(self, directory: Root, folder: str, columns: Sequence[str]) -> None:
        self._folder = folder
        self._batches = (b for path in parts_of(directory, folder) for b in batches(directory, path, columns))
        self._left: pa.Table | None = None

    def take(self, rows: int) -> pa.Table | None:
        """The next rows; None for no rows.

        Raises:
            Unreadable: fewer are left.
        """
        if not rows:
            return None
        found = [self._left] if self._left is not None else []
        while sum(map(len, found)) < rows:
            more = next(self._batches, None)
            if more is None:
                raise Unreadable(self._folder, "it has fewer rows than entered the step")
            found.append(more)
        table = pa.concat_tables(found)
        self._left = table.slice(rows)
        return table.slice(0, rows)


def _see(
    step: StepTally, steps: Sequence[StepTally], batch: Batch, entered: np.ndarray, assigned: pa.Table | None
) -> None:
    dropped, kept = batch.number == step.number, batch.number > step.number
    if step.score:
        _see_cut(step, steps, batch, entered, dropped, kept)
    elif step.concepts and assigned is not None:
        _see_density(step.concepts, batch, entered, kept, assigned)
    elif step.rule_name == "dedup" and assigned is not None:
        _see_dedup(step, batch, entered, dropped, kept, assigned)
    elif step.rule_name == "filter":
        _see_filter(step, batch, dropped)


def _see_cut(
    step: StepTally,
    steps: Sequence[StepTally],
    batch: Batch,
    entered: np.ndarray,
    dropped: np.ndarray,
    kept: np.ndarray,
) -> None:
    score = step.score
    assert score is not None
    value = batch.numbers(score.name)
    finite = np.isfinite(value)
    fine = ordered_bits(np.where(finite, value, 0).astype(np.float32)) >> np.uint32(32 - FINE_BITS)
    score.before += np.bincount(fine[entered & finite], minlength=1 << FINE_BITS)
    score.after += np.bincount(fine[kept & finite], minlength=1 << FINE_BITS)
    for other in steps:
        if other.score and other.score.name != score.name and other.score.threshold is not None:
            below = int((batch.numbers(other.score.name)[dropped] < other.score.threshold).sum())
            step.overlap[other.name] = step.overlap.get(other.name, 0) + below
    if score.threshold is not None:
        gap = np.abs(value - score.threshold)
        found = _candidates(gap, batch.row, value, np.full(len(value), score.threshold), kept)
        step.near_kept = _best(step.near_kept, found, kept & finite, NEAR)
        step.near_dropped = _best(step.near_dropped, found, dropped & finite, NEAR)


def _see_dedup(
    step: StepTally, batch: Batch, entered: np.ndarray, dropped: np.ndarray, kept: np.ndarray, assigned: pa.Table
) -> None:
    threshold = np.full(len(batch.row), 1 - float(step.rule.epsilon))
    cosine = np.full(len(batch.row), np.nan)
    cosine[entered] = assigned.column("max_cosine").to_numpy()
    at = np.zeros(len(batch.row), np.int64)
    at[entered] = np.arange(len(assigned))
    of = assigned.column("duplicate_of").take(pa.array(at))
    near = _candidates(np.abs(cosine - threshold), batch.row, cosine, threshold, kept, of)
    step.near_kept = _best(step.near_kept, near, kept & (cosine >= -0.999), NEAR)  # -1: the first of its cluster
    step.near_dropped = _best(step.near_dropped, near, dropped, NEAR)
    # The uid's leading digits are as good as random, and the same rows are drawn in every run.
    chance = np.zeros(len(batch.row))
    chance[dropped] = [int(uid[:12], 16) for uid in batch.table.column("uid").filter(pa.array(dropped)).to_pylist()]
    drawn = _candidates(chance, batch.row, cosine, threshold, kept, of)
    step.pairs = _best(step.pairs, drawn, dropped, PAIRS)


def _see_filter(step: StepTally, batch: Batch, dropped: np.ndarray) -> None:
    value, threshold = batch.numbers("value"), batch.numbers("threshold")
    gap = np.abs(value - threshold) / np.maximum(np.abs(threshold), 1e-12)
    reason = batch.table.column("reason")
    found = _candidates(gap, batch.row, value, threshold, batch.number > step.number, reason)
    mine = dropped & np.isfinite(gap)
    for name in pc.unique(reason.filter(pa.array(mine))).to_pylist():
        its = mine & np.asarray(pc.fill_null(pc.equal(reason, name), False))
        step.by_reason[name] = _best(step.by_reason.get(name), found, its, NEAR)


def _see_density(concepts: Concepts, batch: Batch, entered: np.ndarray, kept: np.ndarray, assigned: pa.Table) -> None:
    cluster, distance = assigned.column("cluster").to_numpy(), assigned.column("distance").to_numpy().astype(np.float64)
    row, kept = batch.row[entered], kept[entered]
    found = _candidates(distance, row, distance, np.full(len(row), np.nan), kept, None, cluster)
    for number in concepts.shown:
        members = cluster == number
        if members.any():
            concepts.typical[number] = _best(concepts.typical.get(number), found, members, TYPICAL)
    if concepts.pick != "random":
        # Hard keeps the far rows, so the last kept is the nearest kept one, and the first dropped the farthest dropped.
        sign = 1.0 if concepts.pick == "hard" else -1.0
        concepts.last_kept = _first_of_each(concepts.last_kept, found, kept, sign)
        concepts.first_dropped = _first_of_each(concepts.first_dropped, found, ~kept, -sign)


def _candidates(
    rank: np.ndarray,
    row: np.ndarray,
    value: np.ndarray,
    threshold: np.ndarray,
    kept: np.ndarray,
    of: pa.ChunkedArray | None = None,
    cluster: np.ndarray | None = None,
) -> pa.Table:
    rows = len(row)
    return pa.table(
        [
            pa.array(rank),
            pa.array(row),
            pa.array(value, from_pandas=True),
            pa.array(threshold, from_pandas=True),
            pa.array(kept),
            pa.nulls(rows, pa.string()) if of is None else of,
            pa.nulls(rows, pa.int32()) if cluster is None else pa.array(cluster, pa.int32()),
        ],
        schema=CANDIDATES,
    )


def _best(known: pa.Table | None, found: pa.Table, mask: np.ndarray, rows: int) -> pa.Table:
    """The `rows` candidates of the lowest (rank, row) among those known and those found where the mask says so."""
    table = found.filter(pa.array(mask))
    table = table if known is None else pa.concat_tables([known, table])
    return table.take(pc.select_k_unstable(table, rows, [("rank", "ascending"), ("row", "ascending")]))


def _first_of_each(known: pa.Table, found: pa.Table, mask: np.ndarray, sign: float) -> pa.Table:
    """Of each cluster the candidate of the lowest (sign x value, row)."""
    table = pa.concat_tables([known, found.filter(pa.array(mask))])
    cluster, value, row = (table.column(n).to_numpy() for n in ("cluster", "value", "row"))
    order = np.lexsort((row, sign * value, cluster))
    _, first = np.unique(cluster[order], return_index=True)
    return table.take(pa.array(order[first]))


def _drawn(
    stride: int,
    pieces: list[tuple[np.ndarray, list[str], dict[str, np.ndarray], dict[str, np.ndarray]]],
    scores: Sequence[str],
    clustered: Sequence[str],
) -> Drawn:
    def joined(arrays: Iterator[np.ndarray]) -> np.ndarray:
        return np.concatenate([np.zeros(0, np.int64), *arrays])

    return Drawn(
        stride,
        joined(p[0] for p in pieces).astype(np.int64),
        [uid for p in pieces for uid in p[1]],
        {name: joined(p[2][name] for p in pieces).astype(np.float64) for name in scores},
        {name: joined(p[3][name] for p in pieces).astype(np.int64) for name in clustered},
    )
