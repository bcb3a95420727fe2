"""The path, from shard in to shard out: read, embed, select step by step, decide, write, report.

Evidence (samples, vectors, scores) is computed once and kept; each step of the recipe then sees the survivors of the
step before it. The order of everything is the order of this file.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from functools import partial
from importlib import metadata
from itertools import accumulate
from pathlib import PurePosixPath
from typing import Any, Literal

from pipeline.config import nearest
from pipeline.decide import Decide, ShowAssignment, ShowProblems
from pipeline.errors import SchemaError, UserError
from pipeline.parts import Dataset, digest, given
from pipeline.pool import list_units
from pipeline.read import Read
from pipeline.recipe import Arrays, Network, Recipe, resolved
from pipeline.report import write_report
from pipeline.run import Run, read_before
from pipeline.schema import GROUP_UNITS
from pipeline.select.filter import Filter
from pipeline.select.list import List
from pipeline.stage import Stage, Unit
from pipeline.state import Begin
from pipeline.step import Outcome, Step
from pipeline.storage import UnitFiles
from pipeline.times import Times
from pipeline.write import Span, WriteParquet, WriteTar, spans, write_subset

Exported = dict[str, dict[str, Any]]
"""path below the run directory -> {sha256, bytes}."""


@dataclass(frozen=True)
class Curated:
    """What a finished run amounts to.

    Attributes:
        listed: samples of the pool.
        kept: samples that no step dropped.
        funnel: (step, rows that entered, rows that left), from `00-read` on.
        unreadable: samples with a problem.
        damaged: shards with a problem of their own.
        shards: of the pool.
        too_damaged: whether the recipe's limit is exceeded.
    """

    listed: int
    kept: int
    funnel: tuple[tuple[str, int, int], ...]
    unreadable: int
    damaged: int
    shards: int
    too_damaged: bool


@dataclass(frozen=True)
class Pooled:
    """The pool as read: its units, one part each, and the same in groups."""

    units: Sequence[Unit]
    samples: Dataset
    columns: Dataset
    problems: Dataset
    group_units: int

    @property
    def listed(self) -> int:
        return self.samples.num_rows

    def grouped(self, dataset: Dataset) -> Dataset:
        return dataset.grouped(self.group_units)

    def labels(self, folder: str) -> Dataset:
        """For each group: the file of a large table, and the shard of each unit."""
        groups = range(0, len(self.units), self.group_units)
        return given(
            [
                {
                    "path": f"{folder}/{number:08d}.parquet",
                    "shards": [u.shard for u in self.units[first : first + self.group_units]],
                }
                for number, first in enumerate(groups)
            ]
        )


def curate(run: Run, recipe: Recipe, group_units: int = GROUP_UNITS) -> Curated:
    """Find or make everything between the pool and the run directory.

    Args:
        run: where, and by whom.
        recipe: what.
        group_units: units whose rows share one part of a large table.

    Raises:
        UserError: the pool, a model or a list that the recipe names is not as it says.
        RunError: units that could not be finished.
    """
    before = unfinished(run)
    units = list_units(recipe.pool, run.machine.storage_options)
    recipe = pinned(run, recipe, units)
    pool_bytes = sum(source.bytes for unit in units for source in unit.sources.values())
    times = Times.begin(run, digest(work_of(recipe, units)), len(units), pool_bytes)
    run.keep_times = partial(times.write, run)
    stages = networks(run, recipe, units)
    read = run.read(Read(recipe.pool.format), units, after=stages)
    pool = Pooled(units, read["samples"], read["columns"], read["problems"], group_units)
    if not pool.listed:
        raise UserError(f"recipe.pool: no sample in {len(units)} shards; {first_problem(run, pool)}")
    check_columns(recipe, pool)

    seen = evidence(run, recipe, pool, stages)
    samples, columns = pool.grouped(pool.samples), pool.grouped(pool.columns)
    vectors, scores = (
        {name: pool.grouped(outputs[output]) for name, outputs in seen.items()} for output in ("vectors", "scores")
    )
    done = run.map(Begin(), samples, *scores.values())
    begun = Outcome(done["state"], done["dropped"])
    places = given([{"first_unit": i * group_units, "group": i} for i in range(len(samples))])

    state, outcomes, steps = begun.state, list[Outcome](), list[Step]()
    for number, (name, rule) in enumerate(recipe.select, 1):
        step = Step(
            number,
            f"{number:02d}-{name}",
            recipe.seed,
            run,
            samples,
            columns,
            vectors,
            scores,
            state,
            places,
            pool.listed,
        )
        outcome = rule.apply(step)
        state = outcome.state
        steps.append(step)
        outcomes.append(outcome)

    found = [
        pool.samples,
        pool.columns,
        pool.problems,
        state,
        *(o.dropped for o in (begun, *outcomes)),
        *vectors.values(),
        *scores.values(),
        *(o.assign for o in outcomes if o.assign),
    ]
    written = begin(run, recipe, units, found)
    written |= record(run, recipe, pool, scores, steps, [begun, *outcomes])
    written |= write(run, recipe, pool, state, {name: outputs["scores"] for name, outputs in seen.items()}, outcomes)
    return finish(run, recipe, pool, begun, steps, outcomes, written, before, times)


def unfinished(run: Run) -> bytes:
    """Take the checksums away: until they are back, the directory is not finished. What they were, or nothing."""
    try:
        before = run.directory.read("checksums.sha256")
    except FileNotFoundError:
        return b""
    run.directory.delete("checksums.sha256")
    return before


def first_problem(run: Run, pool: Pooled) -> str:
    """Why a pool has no sample, told by its first shard that says so."""
    for unit, part in zip(pool.units, pool.problems.parts, strict=True):
        for line in run.rows(part).table().to_pylist():
            return f"{unit.shard}: {line['reason']}: {line['detail']}"
    return "none of their rows was ever downloaded"


def pinned(run: Run, recipe: Recipe, units: Sequence[Unit]) -> Recipe:
    """The recipe with the digests of the files it names, and the formats that its pool allows."""
    models = {}
    for name, model in recipe.models.items():
        models[name] = model
        if isinstance(model, Network):
            from pipeline.encode import resolve  # torch takes seconds to load, and many recipes need none

            found = resolve(model.arch, model.weights)
            if model.sha256 not in (None, found.sha256):
                raise UserError(f"recipe.models.{name}: its weights have sha256 {found.sha256}, not {model.sha256}")
            models[name] = replace(model, sha256=found.sha256)
    select = [(name, rule.pinned(run.machine) if isinstance(rule, List) else rule) for name, rule in recipe.select]
    return replace(recipe, models=models, select=select, write=replace(recipe.write, formats=formats_of(recipe, units)))


def check_columns(recipe: Recipe, pool: Pooled) -> None:
    """See that every metadata column that a step names is in at least one shard.

    Raises:
        UserError: one is in none.
    """
    known = {name for facts in pool.columns.facts() for name in facts["columns"]}
    for at, (name, rule) in enumerate(recipe.select):
        for column in rule.uses_columns():
            if column not in known:
                raise UserError(
                    f"recipe.select.{at}.{name}: no shard of the pool has the column '{column}'"
                    f"{nearest(column, sorted(known))}"
                )


def networks(run: Run, recipe: Recipe, units: Sequence[Unit]) -> list[Stage]:
    """The embedding stage of every model that has to be run, in the recipe's order.

    Raises:
        UserError: the pool has no images.
    """
    models = {name: model for name, model in recipe.models.items() if isinstance(model, Network)}
    if not models:
        return []
    from pipeline.embed import embed
    from pipeline.encode import numerics, resolve

    if recipe.pool.format == "datacomp" and not any("tar" in unit.sources for unit in units):
        raise UserError(f"recipe.models.{next(iter(models))}: this pool has no images; name its arrays instead")
    here = run.numerics(numerics)
    spare = () if recipe.embed_all else leading(recipe)
    return [
        embed(name, resolve(m.arch, m.weights), here, recipe.pool.format, run.machine.fast_decode, spare)
        for name, m in models.items()
    ]


def evidence(run: Run, recipe: Recipe, pool: Pooled, stages: Sequence[Stage]) -> dict[str, dict[str, Dataset]]:
    """Vectors and scores of every model, each once for the whole pool; models that share images share their decode."""
    seen: dict[str, dict[str, Dataset]] = {}
    for name, model in recipe.models.items():
        if isinstance(model, Arrays):
            seen[name] = precomputed(run, recipe, pool, model)
    if stages:
        inputs = [{"samples": pool.samples, "columns": pool.columns}[output] for output in read_before(stages)]
        made = run.map_together(stages, *inputs, units=pool.units, gpu=True)
        run_models = [name for name, model in recipe.models.items() if isinstance(model, Network)]
        seen |= zip(run_models, made, strict=True)
    return {name: seen[name] for name in recipe.models}


def precomputed(run: Run, recipe: Recipe, pool: Pooled, model: Arrays) -> dict[str, Dataset]:
    """Vectors, and their scores, that the pool brings along."""
    from pipeline.precomputed import Precomputed, find_dims

    def opened() -> Iterator[UnitFiles]:
        for unit in pool.units:
            with UnitFiles(unit, run.machine) as files:
                yield files

    dims = find_dims(recipe.pool.format, model.image, model.text, opened())
    stage = Precomputed(model.image, model.text, recipe.pool.format, dims)
    return run.map(stage, pool.samples, units=pool.units)


def leading(recipe: Recipe) -> tuple[Filter | List, ...]:
    """The row rules before the first step of another kind: what they drop is spared the embedding."""
    rules: list[Filter | List] = []
    for _, rule in recipe.select:
        if not isinstance(rule, (Filter, List)):
            break
        rules.append(rule)
    return tuple(rules)


def work_of(recipe: Recipe, units: Sequence[Unit]) -> list[Any]:
    """What is to be done, wherever the pool lies."""
    return [resolved(replace(recipe, pool=replace(recipe.pool, path=""))), [u.shard for u in units]]


def begin(run: Run, recipe: Recipe, units: Sequence[Unit], found: Sequence[Dataset]) -> Exported:
    """Write recipe.yaml, and make sure that every other file of the directory belongs to this very run.

    A receipt tells that a file was written and how long it is, not that nobody has overwritten it with one of the same
    length. So what a run of another recipe, or of other evidence, left in the directory is removed first; the first
    line of recipe.yaml tells them apart, wherever the pool lies.
    """
    mark = digest([*work_of(recipe, units), [list(d.ids()) for d in found]])
    line = f"# {mark}\n".encode()
    if run.directory.bytes("recipe.yaml") is None or not run.directory.read("recipe.yaml").startswith(line):
        forget_others(run, {})
    return put(run, "recipe.yaml", line + resolved(recipe).encode())


def record(
    run: Run,
    recipe: Recipe,
    pool: Pooled,
    scores: dict[str, Dataset],
    steps: Sequence[Step],
    outcomes: Sequence[Outcome],
) -> Exported:
    """decisions/, problems/ and select/: the written reason for every sample.

    Args:
        run, recipe, pool, scores, steps: of the run.
        outcomes: of reading, then of each step.
    """
    samples, columns = pool.grouped(pool.samples), pool.grouped(pool.columns)
    models = recipe.scored
    used = tuple((name, str(kind)) for name, kind in recipe.used_columns.items())
    decide = Decide(tuple(s.name for s in steps), models, used)
    why = [o.dropped for o in outcomes] + [scores[m] for m in models]
    written = run.export(decide, samples, columns, outcomes[-1].state, pool.labels("decisions"), *why)
    problems, labels = pool.grouped(pool.problems), pool.labels("problems")
    written |= run.export(ShowProblems(), problems, samples, labels, *scores.values())
    for step, outcome in zip(steps, outcomes[1:], strict=True):
        folder = f"select/{step.name}"
        if outcome.assign:
            written |= run.export(ShowAssignment(), outcome.assign, samples, pool.labels(f"{folder}/assign"))
        for name, data in outcome.files.items():
            written |= put(run, f"{folder}/{name}", data)
    return written


def formats_of(recipe: Recipe, units: Sequence[Unit]) -> list[Literal["webdataset", "parquet", "subset"]]:
    """What is written: what the recipe asks for, else what the pool allows.

    Raises:
        UserError: tars are asked for of a pool without tars.
    """
    # A webdataset pool may have lost a tar: its rows are known, but none of them is kept.
    tars = recipe.pool.format == "webdataset" or all("tar" in unit.sources for unit in units)
    if recipe.write.formats is None:
        return ["webdataset", "parquet", "subset"] if tars else ["parquet", "subset"]
    if "webdataset" in recipe.write.formats and not tars:
        raise UserError("recipe.write.formats: webdataset needs a pool of tars; this one allows parquet and subset")
    return recipe.write.formats


def write(
    run: Run,
    recipe: Recipe,
    pool: Pooled,
    state: Dataset,
    scores: dict[str, Dataset],
    outcomes: Sequence[Outcome],
) -> Exported:
    """filtered/, parquet/ and subset.npy: the kept samples."""
    formats = recipe.write.formats or []
    models = recipe.scored
    plan = Plan.of(pool, state, recipe.write.samples_per_shard)
    inputs = [plan.places, plan.of_units(pool.samples), plan.of_units(pool.columns), plan.of_groups(state)]
    inputs += [plan.of_units(scores[m]) for m in models]
    written: Exported = {}
    if "webdataset" in formats:
        assigns = [plan.of_groups(o.assign) for o in outcomes if o.assign] if recipe.write.annotate else []
        written |= run.export(WriteTar(models, recipe.write.annotate), *inputs, *assigns[-1:], units=plan.units)
    if "parquet" in formats:
        images = recipe.pool.format if recipe.write.images else None
        written |= run.export(WriteParquet(models, images), *inputs, units=plan.units)
    if "subset" in formats:
        written |= write_subset(run, pool.grouped(pool.samples), state)
    return written


@dataclass(frozen=True)
class Plan:
    """Which rows each output shard takes, and which units and groups hold them.

    Attributes:
        spans: one for each output shard.
        places: what each task is told (write.kept_rows, and how keys are named).
        units: the shards that each task reads from.
        group_units: units of a group.
    """

    spans: Sequence[Span]
    places: Dataset
    units: Sequence[Sequence[Unit]]
    group_units: int

    @staticmethod
    def of(pool: Pooled, state: Dataset, rows: int) -> Plan:
        """Cut the survivors of a state into output shards of `rows`."""
        found = spans([n for facts in state.facts() for n in facts["alive_by_unit"]], rows)
        starts = [0, *accumulate(sum(f.rows for f in part.files) for part in pool.samples.parts)]
        contents = [facts["content"] for facts in pool.samples.facts()]
        prefixes = folder_prefixes([u.shard for u in pool.units])
        size, places = pool.group_units, []
        for number, span in enumerate(found):
            groups = range(span.first_unit // size, span.last_unit // size + 1)
            mine = slice(span.first_unit, span.last_unit + 1)
            shards = [u.shard for u in pool.units[mine]]
            places.append(
                {
                    "number": number,
                    "skip": span.skip,
                    "take": span.take,
                    "state_first": starts[span.first_unit] - starts[groups[0] * size],
                    "group_rows": [starts[min((g + 1) * size, len(pool.units))] - starts[g * size] for g in groups],
                    "content": [contents[i] for i in range(span.first_unit, span.last_unit + 1)],
                    "shards": shards,
                    "stems": [PurePosixPath(shard).name.split(".")[0] for shard in shards],
                    "prefixes": prefixes[mine],
                }
            )
        units = [pool.units[s.first_unit : s.last_unit + 1] for s in found]
        names = [" to ".join(dict.fromkeys([mine[0].shard, mine[-1].shard])) for mine in units]
        return Plan(found, given(places, names), units, size)

    def of_units(self, dataset: Dataset) -> Dataset:
        """The parts of the units that each output shard takes from, as one part each."""
        return dataset.joined([range(s.first_unit, s.last_unit + 1) for s in self.spans])

    def of_groups(self, dataset: Dataset) -> Dataset:
        """The same for a dataset of groups."""
        size = self.group_units
        return dataset.joined([range(s.first_unit // size, s.last_unit // size + 1) for s in self.spans])


def folder_prefixes(shards: Sequence[str]) -> list[str]:
    """What is put before the keys of each shard: nothing, or the number of its folder in a pool of several."""
    folders = list(dict.fromkeys(str(PurePosixPath(shard).parent) for shard in shards))
    if len(folders) == 1:
        return [""] * len(shards)
    width = max(3, len(str(len(folders) - 1)))
    number = {folder: f"{i:0{width}d}_" for i, folder in enumerate(folders)}
    return [number[str(PurePosixPath(shard).parent)] for shard in shards]


def put(run: Run, path: str, data: bytes) -> Exported:
    """Write a small file of the run directory from here."""
    run.directory.write(path, data)
    return {path: {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}}


def finish(
    run: Run,
    recipe: Recipe,
    pool: Pooled,
    begun: Outcome,
    steps: Sequence[Step],
    outcomes: Sequence[Outcome],
    written: Exported,
    before: bytes,
    times: Times,
) -> Curated:
    """The run's record: recipe.yaml, run.json, times.json, the report, and last of all the checksums.

    A finished run that was only found again keeps its times and its report.
    """
    alive = alive_after(pool.listed, [begun, *outcomes])
    names = ["00-read", *(s.name for s in steps)]
    funnel = tuple(zip(names, [pool.listed, *alive[:-1]], alive, strict=True))
    damaged = sum(f["shard_problems"] > 0 for f in pool.problems.facts())
    unreadable = pool.listed - alive[0]
    limit = Decimal(str(recipe.limits.max_unreadable))  # as written: 0.29 of 100 is 29
    too_damaged = unreadable > limit * pool.listed or damaged > limit * len(pool.units)
    curated = Curated(pool.listed, alive[-1], funnel, unreadable, damaged, len(pool.units), too_damaged)
    about = {
        "versions": versions(),
        "models": {n: m.sha256 for n, m in recipe.models.items() if isinstance(m, Network)},
        "numerics": run.numerics_class,
        "pool": digest([f["content"] for f in pool.samples.facts()]),
        "funnel": curated.funnel,
        "unreadable": unreadable,
        "damaged_shards": damaged,
        "shards": len(pool.units),
        "health": {step.name: outcome.health for step, outcome in zip(steps, outcomes, strict=True)},
        "drops": {s.name: drops(o.state) for s, o in zip(steps, outcomes, strict=True)},
        "datasets": list(dict.fromkeys(f"{stage}/{key}" for stage, key in run.datasets)),
        "manifests": run.manifests,
    }
    written |= put(run, "run.json", json.dumps(about, indent=1, sort_keys=True).encode() + b"\n")
    forget_others(run, written)
    lines = before.splitlines(keepends=True)
    same = b"".join(line for line in lines if b"  report/" not in line) == checksums(digests_of(written))
    there = all(run.directory.bytes(path) is not None for path in ("times.json", "report/index.html"))
    if run.times or not same or not there:
        times.write(run, sum(file["bytes"] for file in written.values()))
        written |= write_report(run.directory, run.store, run.machine)
        before = checksums(digests_of(written))
    run.directory.write("checksums.sha256", before)
    return curated


def digests_of(written: Exported) -> dict[str, str]:
    """path -> sha256."""
    return {path: file["sha256"] for path, file in written.items()}


def alive_after(listed: int, outcomes: Sequence[Outcome]) -> list[int]:
    """Rows that reading, then each step, leaves alive; the chain neither loses nor gains a row.

    Raises:
        SchemaError: rows in are not rows out and dropped, or a step does not say why of each row that it dropped.
    """
    alive: list[int] = []
    for state, why in ((o.state, o.dropped.num_rows) for o in outcomes):
        facts = list(state.facts())
        entered, left = sum(f["entered"] for f in facts), sum(f["alive"] for f in facts)
        dropped = sum(sum(f["dropped"].values()) for f in facts)
        due = alive[-1] if alive else listed
        if state.num_rows != listed or entered != left + dropped or entered != due or dropped != why:
            found = f"{state.num_rows} of {listed} rows; {entered} entered, {left} left, {dropped} dropped, {why} told"
            raise SchemaError(f"{state.stage}: {found}")
        alive.append(left)
    return alive


def drops(state: Dataset) -> dict[str, Any]:
    """Rows that a step dropped, by reason, and how the conditions of a filter overlap."""
    reasons: Counter[str] = Counter()
    overlap: Counter[str] = Counter()
    for facts in state.facts():
        reasons.update(facts["dropped"])
        overlap.update(facts.get("overlap", {}))
    return {"reasons": dict(sorted(reasons.items())), "overlap": dict(sorted(overlap.items()))}


def versions() -> dict[str, str]:
    """Of pairsieve and of the libraries whose code shapes the bytes."""
    faiss = ("faiss-cpu", "faiss-gpu-cu12")
    libraries = ("numpy", "pyarrow", *faiss, "open_clip_torch", "torch", "torchvision", "pillow", "simplejpeg")
    found = {}
    for name in ("pairsieve", *libraries):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "none"
    return found


OURS = ("decisions", "select", "filtered", "parquet", "problems")
"""Folders of a run directory that hold nothing but what its last run wrote."""


def forget_others(run: Run, written: Exported) -> None:
    """Remove what an earlier run of another recipe left in the directory, or one that was killed."""
    run.directory.sweep((*OURS, "report"))
    for folder in OURS:
        for path in run.directory.list(folder):
            if path not in written:
                run.directory.delete(path)
    if "subset.npy" not in written:
        run.directory.delete("subset.npy")


def checksums(digests: dict[str, str]) -> bytes:
    """The text of checksums.sha256, as sha256sum reads it."""
    return "".join(f"{sha256}  {path}\n" for path, sha256 in sorted(digests.items())).encode()
