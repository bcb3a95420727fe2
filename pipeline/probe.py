"""What `plan` needs to know: a few shards of a pool and this host in, Facts and Speeds out.

All of it is found by doing the work itself for a moment: a few shards are read, some of their images decoded and, where
that can be, put through the models; the kernels of the clustering run on random rows.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from pipeline import kmeans
from pipeline.arrow import fixed, valid
from pipeline.embed import framer
from pipeline.encode import Encoder, Framing, described, numerics, resolve
from pipeline.errors import UserError
from pipeline.images import Undecodable
from pipeline.machine import Machine, bf16_flags, keep_freed_memory
from pipeline.parts import to_parquet
from pipeline.plan import Capacity, Facts, Kernels, Shape, Speeds, rounds, shapes
from pipeline.pool import FORMATS, list_units
from pipeline.precomputed import find_dims
from pipeline.products import BF16_WORK, each_alone, pays
from pipeline.read import Read
from pipeline.recipe import Arrays, Network, Recipe
from pipeline.select.dedup import Dedup, greedy, repeats
from pipeline.select.density import Density
from pipeline.select.filter import Filter
from pipeline.stage import Unit
from pipeline.storage import UnitFiles
from pipeline.vectors import Float16s, draw

UNITS, ROWS = 3, 200
"""Shards that are read beside the last, which may be short, and images of each that are decoded and embedded."""

KERNEL_ROWS, KERNEL_CLUSTERS, KERNEL_ITERATIONS = 8192, 4096, 10
"""Most random vectors, clusters and iterations that kernels are timed with: blocks of full size, each row all clusters'
products, and of the iterations a fifth over all rows. More change a rate little."""

KERNEL_S = 0.1
"""Processor seconds that a kernel is timed for, at least."""

WARM = 8
"""Images and captions of a first forward pass, which prepares what later ones find."""

T = TypeVar("T")


@dataclass(frozen=True)
class Probe:
    """What was found, and how.

    Attributes:
        facts: of the pool.
        speeds: of one worker.
        capacity: of the machine.
        notes: how it was found, and what was assumed; one line each.
    """

    facts: Facts
    speeds: Speeds
    capacity: Capacity
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Models:
    """The models of a recipe.

    Attributes:
        dims: model -> D.
        framings: distinct ones of all models.
        encoders: those loaded here; none where rates are stated.
        stated_s: seconds per image of all models together, where they are stated.
        gpu: whether their speed is that of a GPU.
        note: where the speed is from.
    """

    dims: Mapping[str, int]
    framings: Sequence[Framing]
    encoders: Sequence[Encoder]
    stated_s: float
    gpu: bool
    note: str


@dataclass(frozen=True)
class _Shard:
    """What one shard showed: counts, seconds, and images that were decoded for the models.

    Attributes:
        filtered: number of a filter -> rows that entered it, and that it kept.
        frames: of decoded images, for each framing.
        captions: of the same.
    """

    rows: int
    usable: int
    bytes: int
    listing_bytes: int
    read_s: float
    copied_bytes: int
    copy_s: float
    filtered: dict[int, tuple[int, int]]
    images: int
    image_read_s: float
    decode_s: float
    frames: list[tuple[Any, ...]]
    captions: list[str]


def probe(recipe: Recipe, machine: Machine, rows: int | None = None, pool_bytes: int | None = None) -> Probe:
    """Look at a few shards of the recipe's pool, and at this host.

    Weights that are not in the local cache are downloaded, unless the machine's GPUs are not here anyway.

    Args:
        recipe: what would be run.
        machine: where.
        rows, pool_bytes: of the pool, were it another size (Facts.scaled); None: as it is.

    Raises:
        UserError: the pool or a model is not as the recipe says; or embedding cannot be measured here, and the machine
            file does not state how fast it is.
        OSError: storage failed.
    """
    keep_freed_memory()  # as a worker does
    units = list_units(recipe.pool, machine.storage_options)
    hash_N = draw(recipe.seed, "plan", [unit.shard for unit in units[:-1]])
    chosen = [units[at] for at in (*np.argsort(hash_N, kind="stable")[:UNITS], -1)]
    networks = {name: model for name, model in recipe.models.items() if isinstance(model, Network)}
    models = _models(networks, machine)
    with ExitStack() as stack:
        files = [stack.enter_context(UnitFiles(unit, machine, hashing=True)) for unit in chosen]
        shards = [_look(recipe, machine, *each, models.framings) for each in zip(chosen, files, strict=True)]
        dims = {
            name: find_dims(recipe.pool.format, model.image, model.text, files)
            for name, model in recipe.models.items()
            if isinstance(model, Arrays)
        }
    if not any(shard.rows for shard in shards):
        raise UserError(f"recipe.pool: no sample in {', '.join(unit.shard for unit in chosen)}")
    facts = _facts(units, shards, {**models.dims, **dims}).scaled(rows, pool_bytes)
    speeds = _speeds(recipe, machine, shards, models, facts)
    capacity, left_open = _capacity(machine, models.gpu)
    looked = f"{len(shards)} of {len(units):,} shards were read here, on {os.cpu_count()} cores"
    images = sum(shard.images for shard in shards)
    decoded = f", and {images:,} of their images decoded" if images else ""
    return Probe(facts, speeds, capacity, tuple(note for note in (looked + decoded, models.note, *left_open) if note))


def _timed(work: Callable[[], T], clock: Callable[[], float] = time.perf_counter) -> tuple[T, float]:
    start = clock()
    result = work()
    return result, clock() - start


def _models(networks: Mapping[str, Network], machine: Machine) -> _Models:
    """The models, loaded where they can be measured; else as the machine file states them.

    Raises:
        UserError: neither can be.
    """
    if not networks:
        return _Models({}, [], [], 0.0, False, "")
    on_gpu = machine.device == "cuda" or (machine.device == "auto" and bool(machine.gpus))
    try:
        here = numerics(machine)
        if on_gpu and here.device != "cuda":
            raise UserError("machine.gpus: there are none on this host")
        weights = [resolve(model.arch, model.weights) for model in networks.values()]
    except UserError as error:
        if not on_gpu:
            raise
        return _stated(networks, machine, error)
    encoders = [Encoder(found, here, machine.threads) for found in weights]
    framings = list(dict.fromkeys(encoder.framing for encoder in encoders))
    dims = {name: encoder.dims for name, encoder in zip(networks, encoders, strict=True)}
    note = f"forward passes were measured here: {here.precision} on {here.kind}"
    return _Models(dims, framings, encoders, 0.0, here.device == "cuda", note)


def _stated(networks: Mapping[str, Network], machine: Machine, why: UserError) -> _Models:
    """Models that are not run here, by the rates of the machine file."""
    archs = [model.arch or model.weights for model in networks.values()]
    rates = machine.rates.images_per_s if machine.rates else {}
    seconds = 0.0
    for arch in archs:
        plain = arch.removesuffix("-quickgelu")
        if plain not in rates:
            raise UserError(f"machine.rates.images_per_s: state {plain}; it cannot be measured on this host: {why}")
        seconds += 1 / rates[plain]
    shapes = [described(arch) for arch in archs]
    dims = {name: size for name, (_, size) in zip(networks, shapes, strict=True)}
    source = machine.rates.source if machine.rates else ""
    note = f"no GPU was measured: {1 / seconds:,.0f} images a second through all models, by machine.rates ({source})"
    return _Models(dims, list(dict.fromkeys(framing for framing, _ in shapes)), [], seconds, True, note)


def _look(recipe: Recipe, machine: Machine, unit: Unit, files: UnitFiles, framings: Sequence[Framing]) -> _Shard:
    """Read one shard as a run would, judge its rows by the filters, decode some of its images for the models."""

    def listed() -> tuple[pa.Table, pa.Table, int]:
        for role in unit.sources:
            files.open(role)
        tables = Read(recipe.pool.format).build(machine)(files).tables
        stored = sum(len(to_parquet(table, internal=True)) for table in tables.values())
        return tables["samples"], tables["columns"], stored

    (samples, columns, listing_bytes), read_s = _timed(listed)
    copied_bytes, copy_s = _timed(partial(_copy, files.open(next(iter(unit.sources))).path, machine.scratch))
    usable_M = row_M = np.flatnonzero(~valid(samples["problem"]))
    filtered: dict[int, tuple[int, int]] = {}
    for number, (_, rule) in enumerate(recipe.select, 1):
        if isinstance(rule, Filter):
            taken = pa.array(row_M)
            kept_M = row_M[~valid(rule.build(machine)(samples.take(taken), columns.take(taken)).reason)]
            filtered[number] = (len(row_M), len(kept_M))
            row_M = kept_M
    keys = samples["key"].take(pa.array(row_M)).to_pylist()
    drawn_M = np.sort(row_M[np.argsort(draw(recipe.seed, "plan", keys), kind="stable")[:ROWS]])
    drawn = samples.take(pa.array(drawn_M)) if framings else samples.slice(0, 0)
    images, image_read_s, decode_s, frames, captions = _decoded(recipe, machine, files, drawn, framings)
    return _Shard(
        rows=len(samples),
        usable=len(usable_M),
        bytes=sum(source.bytes for source in unit.sources.values()),
        listing_bytes=listing_bytes,
        read_s=read_s,
        copied_bytes=copied_bytes,
        copy_s=copy_s,
        filtered=filtered,
        images=images,
        image_read_s=image_read_s,
        decode_s=decode_s,
        frames=frames,
        captions=captions,
    )


def _copy(path: str, folder: str | None) -> int:
    """Copy a file with its digest, as the filtered shards are written; its length."""
    with open(path, "rb") as source, tempfile.TemporaryFile(dir=folder) as target:
        digest = hashlib.sha256()
        while block := source.read(1 << 20):
            digest.update(block)
            target.write(block)
        target.flush()
        os.fsync(target.fileno())
        return target.tell()


def _decoded(
    recipe: Recipe, machine: Machine, files: UnitFiles, samples: pa.Table, framings: Sequence[Framing]
) -> tuple[int, float, float, list[tuple[Any, ...]], list[str]]:
    """Images that were tried, seconds of reading and of decoding them, and frames and captions of those that decode."""
    if not len(samples):
        return 0, 0.0, 0.0, [], []
    frame = framer(framings, machine.fast_decode)
    stored, read_s = _timed(lambda: list(FORMATS[recipe.pool.format].images(files, samples)))
    framed, decode_s = _timed(lambda: [frame(data) for data in stored], time.thread_time)
    captions = samples["caption"].to_pylist()
    pairs = [(f, caption) for f, caption in zip(framed, captions, strict=True) if not isinstance(f, Undecodable)]
    return len(stored), read_s, decode_s, [f for f, _ in pairs], [caption for _, caption in pairs]


def _facts(units: Sequence[Unit], shards: Sequence[_Shard], dims: Mapping[str, int]) -> Facts:
    """The pool, as far as the shards stand for it; the last of them is the pool's last."""
    pool_bytes = sum(source.bytes for unit in units for source in unit.sources.values())
    rows, images, read_bytes = (sum(getattr(s, name) for s in shards) for name in ("rows", "images", "bytes"))
    decodable = sum(len(s.frames) for s in shards) / images if images else 1.0
    passing = {}
    for number in shards[0].filtered:
        entered, kept = (sum(s.filtered[number][side] for s in shards) for side in (0, 1))
        passing[number] = kept / entered if entered else 1.0
    unread = round(rows * (pool_bytes - read_bytes) / read_bytes)
    if len(full := {s.rows for s in shards[:-1]}) == 1:  # shards are cut by rows, and none is lacking
        unread = (len(units) - len(shards)) * full.pop()
    return Facts(
        rows=rows + unread,
        shards=len(units),
        pool_bytes=pool_bytes,
        files=len(units[0].sources),
        usable=decodable * sum(s.usable for s in shards) / rows,
        listing_bytes=sum(s.listing_bytes for s in shards) / rows,
        passing=passing,
        dims=dims,
    )


def _speeds(recipe: Recipe, machine: Machine, shards: Sequence[_Shard], models: _Models, facts: Facts) -> Speeds:
    """Seconds of one worker for what was done, and what the models and kernels take."""
    images = max(1, sum(s.images for s in shards))
    row_bytes = sum(s.bytes for s in shards) / sum(s.rows for s in shards)
    embed_s = {"read": sum(s.image_read_s for s in shards) / images, "image": models.stated_s}
    if models.dims:
        embed_s["write"] = _write_s(models.dims)
    if models.encoders:
        frames, captions = [f for s in shards for f in s.frames], [c for s in shards for c in s.captions]
        embed_s |= _forward_s(models, machine, frames, captions)
    kernels = {}
    for number, shape in shapes(recipe, facts).items():
        rule = recipe.select[number - 1][1]
        if isinstance(rule, (Dedup, Density)):
            kernels[number] = _kernels(rule, shape, facts.shards, machine.threads)
    return Speeds(
        read_s=sum(s.read_s for s in shards) / sum(s.bytes for s in shards),
        embed_s=embed_s,
        decode_s=sum(s.decode_s for s in shards) / images / row_bytes,
        write_s=sum(s.copy_s for s in shards) / sum(s.copied_bytes for s in shards),
        kernels=kernels,
    )


def _forward_s(
    models: _Models, machine: Machine, frames: Sequence[tuple[Any, ...]], captions: Sequence[str]
) -> dict[str, float]:
    """Seconds per image and per caption through all towers, one after the other."""
    found = {"image": 0.0, "text": 0.0}
    for encoder in models.encoders:
        own = [frame[models.framings.index(encoder.framing)] for frame in frames]
        _towers(encoder, machine, own[:WARM], captions[:WARM])
        image_s, text_s = _towers(encoder, machine, own, captions)
        found["image"] += image_s / max(1, len(frames))
        found["text"] += text_s / max(1, len(frames))
    return found


def _towers(
    encoder: Encoder, machine: Machine, frames: Sequence[np.ndarray], captions: Sequence[str]
) -> tuple[float, float]:
    """Seconds of the image tower and of the text tower."""
    size = machine.image_batch
    batches = [np.stack(frames[i : i + size]) for i in range(0, len(frames), size)]
    return (
        _timed(lambda: [encoder.images(batch)() for batch in batches])[1],
        _timed(lambda: encoder.texts(captions, machine.text_batch))[1],
    )


def _write_s(dims: Mapping[str, int]) -> float:
    """Seconds to make the vectors of one image and its caption parquet."""
    rows = 1000
    vectors = {f"{name}.{side}": np.ones((rows, size), np.float16) for name, size in dims.items() for side in "it"}
    table = pa.table({name: fixed(vec_ND) for name, vec_ND in vectors.items()})
    return _timed(lambda: to_parquet(table, internal=True))[1] / rows


def _kernels(rule: Dedup | Density, shape: Shape, shards: int, threads: int) -> Kernels:
    """Multiply-adds a second of one worker in a step's k-means, assignment and comparisons, as a run calls them.

    Whether bfloat16 is multiplied first is decided by the step's own shape. One core's rates, whatever the threads of
    the libraries in this process, times the worker's threads.
    """
    k, d = min(shape.clusters, KERNEL_CLUSTERS), shape.dims
    random = np.random.default_rng(0).normal(size=(KERNEL_ROWS, d))
    vec_ND = (random / np.linalg.norm(random, axis=1, keepdims=True)).astype(np.float16)
    centroid_KD = kmeans.on_grid(vec_ND[:k])

    many = min(shape.sample, KERNEL_ROWS)
    if pays(shape.sample * shape.clusters * d):
        many = max(many, -(-BF16_WORK // (k * d)))  # k-means decides by what it is given
    iterations = min(rule.iterations, KERNEL_ITERATIONS)
    unit_rows = min(max(1, shape.rows // shards), KERNEL_ROWS)
    unit_bf16 = pays(shape.rows // shards * shape.clusters * d)
    works: list[tuple[Callable[[Float16s], object], Float16s]] = [
        (lambda vec: kmeans.train(vec, k, iterations, seed=0, threads=1), np.resize(vec_ND, (many, d))),
        (lambda vec: kmeans.nearest(vec, centroid_KD, bf16=unit_bf16), vec_ND[:unit_rows]),
    ]
    members = min(max(1, shape.rows // shape.clusters), KERNEL_ROWS)
    if isinstance(rule, Dedup):
        compare = repeats if rule.rule == "official" else partial(greedy, min_cos=1 - float(rule.epsilon))
        bf16 = pays((shape.rows // shape.clusters) ** 2 * d // 2)
        works.append((partial(compare, bf16=bf16), vec_ND[:members]))
    with each_alone(1, bool(bf16_flags())) as pool:
        train_s, assign_s, *compare_s = pool.map(_core_seconds, *zip(*works, strict=True))
    return Kernels(
        train=threads * many * k * d * rounds(many, k, iterations) / train_s,
        assign=threads * unit_rows * k * d / assign_s,
        compare=threads * members**2 / 2 * d / sum(compare_s) if compare_s else np.inf,
    )


def _core_seconds(work: Callable[[Float16s], object], vec_ND: Float16s) -> float:
    """Processor seconds of a call, after one that prepares what later ones find."""
    work(vec_ND[:WARM])
    calls, start = 0, time.process_time()
    while not calls or time.process_time() - start < KERNEL_S:
        work(vec_ND)
        calls += 1
    return (time.process_time() - start) / calls


def _capacity(machine: Machine, gpu: bool) -> tuple[Capacity, list[str]]:
    """Who would work; what the machine file leaves open is as on this host, and one GPU."""
    workers = machine.workers or max(1, (os.cpu_count() or 1) // machine.threads)
    notes = [] if machine.workers else [f"machine.workers is open: {workers} counted, as on this host"]
    if gpu and not machine.gpus:
        notes.append("machine.gpus is open: 1 counted")
    return Capacity(workers, (machine.gpus or 1) if gpu else 0, machine.threads, machine.decoders), notes
