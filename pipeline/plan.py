"""What a run would take: what was found of a pool and measured of a host in; hours, bytes and money out.

Costs grow as the algorithms do: reading with the pool's bytes, embedding with its images, k-means with rows x clusters,
dedup with rows x rows of a cluster, the rest with rows. Seconds are those of busy workers; that they share the work
evenly, as far as it has parts enough, and nothing is lost is assumed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from pipeline.cluster import LEAST_ROWS, SAMPLE_ROWS, is_drawn
from pipeline.costs import embedding_seconds, verdict
from pipeline.kmeans import over_all, stride
from pipeline.recipe import Network, Recipe, Rule
from pipeline.schema import GROUP_UNITS
from pipeline.select.cut import Cut
from pipeline.select.dedup import BUCKET_ROWS, CLUSTER_ROWS, TASKS, Dedup
from pipeline.select.density import Density
from pipeline.select.filter import Filter
from pipeline.select.list import List
from pipeline.select.random import Random
from pipeline.step import asked


@dataclass(frozen=True)
class PerRow:
    """What handling a row takes beside its image and its cosines.

    Measured with 20,000 and 80,000 rows of 512 dimensions (the slope between them) on one core of a 2-core AMD EPYC; of
    dedup and density with 80,000 and 160,000, of cut and random with 2 million in two groups, on a 2-core Intel Xeon.

    Attributes:
        seconds: of one core.
        bytes: written.
    """

    seconds: float
    bytes: float


LISTED = PerRow(11e-6, 55)
KEPT = PerRow(9e-6, 100)
ENTERED = {
    List: PerRow(4.5e-6, 1),
    Filter: PerRow(4.5e-6, 1),
    Cut: PerRow(0.2e-6, 6),
    Random: PerRow(1.6e-6, 8),
    Dedup: PerRow(18e-6, 95),
    Density: PerRow(9e-6, 16),
}
PASS_S = 13e-6
"""Of an exact pass of the clustering, per row, beside its cosines."""

TARRED_S, SHARD_S = 14e-6, 0.025
"""Of copying a row's members into a filtered shard, beside their bytes; of each shard, beside its rows. Measured on the
EPYC, with 17,000 rows in 2 and in 9 shards."""

CENTROID_BYTES = 40
"""Of each number of a centroid, that training holds: sums and centroids, old and new, of float64 and float32."""

ARRAY_S = 20e-9
"""Per byte of vectors that a pool brings along."""


@dataclass(frozen=True)
class Facts:
    """What is known of a pool.

    Attributes:
        rows: listed samples.
        shards: units.
        pool_bytes: of all files.
        files: of one unit.
        usable: share of the rows that have no problem.
        listing_bytes: that the first read writes for a row.
        passing: number of a filter (from 1) -> share of the rows entering it that it keeps.
        dims: model -> D of its vectors.
    """

    rows: int
    shards: int
    pool_bytes: int
    files: int
    usable: float
    listing_bytes: float
    passing: Mapping[int, float]
    dims: Mapping[str, int]

    def scaled(self, rows: int | None, pool_bytes: int | None) -> Facts:
        """The same pool, were it as large; the bytes of a row stay what they are unless they are given."""
        rows = rows or self.rows
        more = rows / self.rows
        found = pool_bytes or round(self.pool_bytes * more)
        shards = max(1, round(self.shards * more))
        return Facts(
            *(rows, shards, found, self.files, self.usable, self.listing_bytes),
            *(self.passing, self.dims),
        )


@dataclass(frozen=True)
class Shape:
    """What a clustering step computes with.

    Attributes:
        rows: survivors that enter it, at least one.
        clusters: K.
        dims: D.
        sample: rows that k-means trains on, in one process.
    """

    rows: int
    clusters: int
    dims: int
    sample: int


@dataclass(frozen=True)
class Kernels:
    """Multiply-adds a second of one worker: of k-means, of the exact assignment, of comparing inside a cluster."""

    train: float
    assign: float
    compare: float


@dataclass(frozen=True)
class Speeds:
    """What one worker takes.

    Attributes:
        read_s: per byte of the pool: fetched, hashed and listed.
        embed_s: per image, by phase (costs.PHASES), of all models together; decoding per byte of the pool below.
        decode_s: processor seconds per byte of the pool.
        write_s: per byte that is copied into the filtered shards.
        kernels: number of a clustering step (from 1) -> its rates, at its own shape.
    """

    read_s: float
    embed_s: Mapping[str, float]
    decode_s: float
    write_s: float
    kernels: Mapping[int, Kernels]


@dataclass(frozen=True)
class Capacity:
    """Who works: CPU workers of so many threads each; for embedding GPUs, where there are any; decoders beside each."""

    workers: int
    gpus: int
    threads: int
    decoders: int


@dataclass(frozen=True)
class Line:
    """One kind of work.

    Attributes:
        name: `read`, `embed`, `NN-NAME` of a step, `decide` or `write`.
        core_hours, gpu_hours: that its workers hold.
        hours: from its start to its end.
        serial_hours: of them, those of a single worker.
        serial_bytes: that it holds in memory.
    """

    name: str
    core_hours: float
    gpu_hours: float
    hours: float
    serial_hours: float = 0.0
    serial_bytes: int = 0


@dataclass(frozen=True)
class Plan:
    """What a run would take.

    Attributes:
        rows: listed.
        embedded: rows that go through the models.
        kept: rows that are left, at most.
        unpredictable: steps whose drops nobody knows before; they are counted as if they dropped nothing.
        lines: of all work, in order.
        read_bytes: from the pool.
        stored: what is written, in bytes by kind.
        requests: to storage.
        bound: what bounds embedding (costs.verdict); empty where nothing is embedded.
    """

    rows: int
    embedded: int
    kept: int
    unpredictable: tuple[str, ...]
    lines: tuple[Line, ...]
    read_bytes: float
    stored: Mapping[str, float]
    requests: float
    bound: str

    @property
    def core_hours(self) -> float:
        return sum(line.core_hours for line in self.lines)

    @property
    def gpu_hours(self) -> float:
        return sum(line.gpu_hours for line in self.lines)

    @property
    def hours(self) -> float:
        return sum(line.hours for line in self.lines)

    @property
    def stored_bytes(self) -> float:
        return sum(self.stored.values())


def predict(recipe: Recipe, facts: Facts, speeds: Speeds, capacity: Capacity) -> Plan:
    """Hours, bytes and requests of a recipe on a pool, by workers of known speed."""
    usable = round(facts.rows * facts.usable)
    networks = [name for name, model in recipe.models.items() if isinstance(model, Network)]
    embedded = _embedded(recipe, facts, usable) if networks else 0
    row_bytes = facts.pool_bytes / facts.rows

    groups = -(-facts.shards // GROUP_UNITS)
    lines = [_line("read", facts.pool_bytes * speeds.read_s, capacity, facts.shards)]
    vector_bytes = {
        name: 2 * facts.dims[name] * len(model.sides) * (embedded if name in networks else usable)
        for name, model in recipe.models.items()
    }
    bound = ""
    if networks:
        each = {**speeds.embed_s, "decode": speeds.decode_s * row_bytes}
        bound = verdict(each, capacity.gpus or capacity.workers, capacity.decoders)
        lines.append(_embedding(embedded * embedding_seconds(each, capacity.decoders), capacity, facts.shards))
    if len(networks) < len(recipe.models):
        own = sum(size for name, size in vector_bytes.items() if name not in networks)
        lines.append(_line("arrays", own * ARRAY_S, capacity, facts.shards))

    entering, unpredictable = survivors(recipe, facts)
    clustered, step_bytes = shapes(recipe, facts), 0.0
    for number, (kind, rule) in enumerate(recipe.select, 1):
        entered, shape = entering[number - 1], clustered.get(number)
        shared, serial, held = entered * ENTERED[type(rule)].seconds, 0.0, 0
        step_bytes += entered * ENTERED[type(rule)].bytes
        if isinstance(rule, (Dedup, Density)) and shape:
            more, serial = _clustering_seconds(rule, shape, speeds.kernels[number])
            shared, held = shared + more, shape.dims * (2 * shape.sample + CENTROID_BYTES * shape.clusters)
            drawn = shape.sample if is_drawn(shape.sample, shape.rows, facts.rows) else 0
            step_bytes += 2 * shape.dims * (drawn + (shape.rows if isinstance(rule, Dedup) else 0))
        lines.append(replace(_line(f"{number:02d}-{kind}", shared, capacity, groups, serial), serial_bytes=held))
    alive = entering[-1]

    lines.append(_line("decide", facts.rows * LISTED.seconds, capacity, groups))
    copied = alive * row_bytes if _writes_tars(recipe) else 0.0
    written = _written_shards(recipe, alive)
    write_s = alive * KEPT.seconds + written * SHARD_S + copied * speeds.write_s
    lines.append(_line("write", write_s + (alive * TARRED_S if copied else 0.0), capacity, written))
    stored = {
        "samples": facts.rows * facts.listing_bytes,
        "vectors": float(sum(vector_bytes.values())),
        "steps and decisions": step_bytes + facts.rows * LISTED.bytes,
        "kept samples": alive * KEPT.bytes + copied,
    }
    read_bytes = facts.pool_bytes + copied
    requests = _requests(recipe, facts, len(networks), alive, entering)
    return Plan(facts.rows, embedded, alive, unpredictable, tuple(lines), read_bytes, stored, requests, bound)


def survivors(recipe: Recipe, facts: Facts) -> tuple[list[int], tuple[str, ...]]:
    """Rows that enter each step, and last those that are left; and the steps whose drops nobody knows before."""
    alive, unpredictable = [round(facts.rows * facts.usable)], []
    for number, (kind, rule) in enumerate(recipe.select, 1):
        left = _left(rule, alive[-1], facts, number)
        if left is None:
            unpredictable.append(f"{number:02d}-{kind}")
        alive.append(alive[-1] if left is None else left)
    return alive, tuple(unpredictable)


def shapes(recipe: Recipe, facts: Facts) -> dict[int, Shape]:
    """Number of each clustering step that rows enter -> what it computes with."""
    return {
        number: Shape(rows, clusters(rule, rows), facts.dims[owner(rule)], sample_rows(rule, rows))
        for number, ((_, rule), rows) in enumerate(zip(recipe.select, survivors(recipe, facts)[0], strict=False), 1)
        if isinstance(rule, (Dedup, Density)) and rows
    }


def rounds(rows: int, k: int, iterations: int) -> float:
    """How often k-means goes through its sample: its first iterations are over some of the rows."""
    last = over_all(iterations)
    return last + (iterations - last) / stride(rows, k)


def sample_rows(rule: Dedup | Density, alive: int) -> int:
    """Rows that k-means trains on, in one process."""
    return min(alive, max(min(clusters(rule, alive) * rule.sample_per_cluster, SAMPLE_ROWS), LEAST_ROWS))


def clusters(rule: Dedup | Density, alive: int) -> int:
    """K of a clustering step that so many rows enter."""
    return min(rule.count(alive) if isinstance(rule, Dedup) else rule.clusters, alive)


def _line(name: str, seconds: float, capacity: Capacity, parts: int, serial_s: float = 0.0) -> Line:
    """Work of CPU workers, each at one part of it at least; `serial_s` of it by one of them while the others wait."""
    hours = (seconds / max(1, min(capacity.workers, parts)) + serial_s) / 3600
    return Line(name, (seconds + serial_s) * capacity.threads / 3600, 0.0, hours, serial_s / 3600)


def _embedding(seconds: float, capacity: Capacity, shards: int) -> Line:
    """Work of workers with decoders beside them: those of the GPUs, or else the CPU workers."""
    many = min(capacity.gpus or capacity.workers, shards)
    core_hours = seconds * (capacity.threads + capacity.decoders) / 3600
    return Line("embed", core_hours, seconds / 3600 if capacity.gpus else 0.0, seconds / many / 3600)


def _embedded(recipe: Recipe, facts: Facts, usable: int) -> int:
    """Rows that the filters at the head of the recipe leave to the models."""
    share = 1.0
    if not recipe.embed_all:
        for number, (_, rule) in enumerate(recipe.select, 1):
            if not isinstance(rule, (Filter, List)):
                break
            share *= facts.passing.get(number, 1.0)
    return round(usable * share)


def _clustering_seconds(rule: Dedup | Density, shape: Shape, kernels: Kernels) -> tuple[float, float]:
    """Seconds of the kernels of a step for all workers together, and those that one of them works alone."""
    every = shape.clusters * shape.dims
    serial = shape.sample * every * rounds(shape.sample, shape.clusters, rule.iterations) / kernels.train
    seconds = shape.rows * (every * (rule.passes + 1) / kernels.assign + rule.passes * PASS_S)
    if isinstance(rule, Dedup):
        seconds += shape.rows * (shape.rows / shape.clusters) / 2 * shape.dims / kernels.compare
    return seconds, serial


def owner(rule: Dedup | Density) -> str:
    """The model whose vectors a step clusters."""
    return rule.space.partition(".")[0]


def _left(rule: Rule, alive: int, facts: Facts, number: int) -> int | None:
    """Rows that a step leaves, or None where its parameters do not say."""
    if isinstance(rule, Filter):
        return round(alive * facts.passing[number])
    if isinstance(rule, (Random, Cut, Density)) and rule.keep is not None:
        return min(alive, asked(rule.keep, facts.rows if rule.of == "pool" else alive))
    return None


def _writes_tars(recipe: Recipe) -> bool:
    if recipe.write.formats is None:
        return recipe.pool.format == "webdataset"
    return "webdataset" in recipe.write.formats


def _requests(recipe: Recipe, facts: Facts, networks: int, kept: int, entering: Sequence[int]) -> float:
    """Calls to storage: of a unit, its files and some 7 small objects, and 4 for each model; some 6 calls for each
    group of units in each of some 12 passes of a step; 2 for each group's rows of a bucket of dedup, there and back;
    10 of an output shard."""
    groups = -(-facts.shards // GROUP_UNITS)
    unit = 2 * facts.files + 7 + 4 * networks
    passes = groups * 6 * 12 * (2 + len(recipe.select))
    compared = [rows for rows, (_, rule) in zip(entering, recipe.select, strict=False) if isinstance(rule, Dedup)]
    buckets = sum(-(-rows // min(BUCKET_ROWS, max(CLUSTER_ROWS, rows // TASKS))) for rows in compared)
    return float(facts.shards * unit + passes + 4 * groups * buckets + 10 * _written_shards(recipe, kept))


def _written_shards(recipe: Recipe, kept: int) -> int:
    return -(-kept // recipe.write.samples_per_shard)
