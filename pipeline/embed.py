"""The forward passes: a unit's images and captions in, one row of vectors per listed sample and model out.

Images are read once and decoded once for all models, beside the forward passes, and never more than a few batches of
them are in memory. Batches are cut by the unit alone, so that the bytes do not depend on who computes them.
"""

from __future__ import annotations

import logging
import socket
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from threading import Lock
from typing import Any, ClassVar, TypeVar

import numpy as np
import pyarrow as pa

from pipeline.arrow import fixed, valid
from pipeline.encode import Encoder, Framing, Numerics, Weights, numerics, resolve
from pipeline.images import Undecodable, decode_rgb, size_px
from pipeline.machine import Machine
from pipeline.pool import FORMATS
from pipeline.schema import SCORES, VECTORS, embeddings
from pipeline.stage import Files, Function, Made, Rows
from pipeline.vectors import Bools, Float32s, Uint8s, row_cosine, unit16

log = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")
Framed = tuple[Uint8s, ...] | Undecodable
"""One image, cut for each distinct framing: uint8, shape (height, width, 3) each; or why there is none."""


@dataclass(frozen=True)
class Embed:
    """One model's vectors of a pool's images and captions.

    Attributes:
        model: its name in the recipe.
        arch: open_clip's name of the architecture, or `hf-hub:org/name`.
        weights: `tiny`, a pretrained tag, `hf-hub:org/name`, or `file`.
        sha256: hex digest of the weights file.
        quick_gelu: whether the activation is forced to QuickGELU (encode.Weights).
        format: of the pool, one of FORMATS.
        device_class: processor features or GPU model, and torch's version (encode.Numerics.kind).
        precision: of the forward pass.
        fast_decode: scaled JPEG decode.
        spare: row rules (select/judge.py) that lead the recipe; rows that they drop are not embedded.
        file: path of a local weights file. Its digest is identity, its place is not.
    """

    model: str
    arch: str
    weights: str
    sha256: str
    quick_gelu: bool
    format: str
    device_class: str
    precision: str
    fast_decode: bool = False
    spare: tuple[Any, ...] = ()
    file: str | None = field(default=None, metadata={"place": True})
    name: ClassVar[str] = "embed"
    version: ClassVar[int] = 4
    outputs: ClassVar[tuple[str, ...]] = ("vectors", "scores")
    exact: ClassVar[bool] = False

    def build(self, machine: Machine) -> Function:
        """A function from the unit's Files and samples, and its columns where `spare` needs them, to schema.embeddings.

        One row per sample, null where the sample has a problem or is spared.
        """
        made_by_all = together([self], machine)

        def function(files: Files, samples: Rows, columns: Rows | None = None) -> Made:
            return made_by_all(files, samples, columns)[0]

        return function

    @staticmethod
    def together(stages: Sequence[Embed], machine: Machine) -> Callable[..., list[Made]]:
        """What run.py calls for several such stages over one unit."""
        return together(stages, machine)


def embed(
    model: str, weights: Weights, numerics: Numerics, format: str, fast_decode: bool, spare: tuple[Any, ...]
) -> Embed:
    """The stage for weights as found, on workers of one numerics class."""
    return Embed(
        model,
        weights.arch,
        weights.source,
        weights.sha256,
        weights.quick_gelu,
        format,
        numerics.kind,
        numerics.precision,
        fast_decode,
        spare,
        file=weights.path if weights.source == "file" else None,
    )


def together(stages: Sequence[Embed], machine: Machine) -> Callable[..., list[Made]]:
    """Load several models that share one pass over the images.

    Args:
        stages: with the same `format`, `spare` and `fast_decode`.
        machine: device, threads, batch sizes.

    Returns:
        A function as that of `Embed.build`, but to one Made per stage.

    Raises:
        RuntimeError: this host computes in another way, or has other weights, than the stage's key says.
        UserError: the weights cannot be had or loaded here.
    """
    first = stages[0]
    if any((s.format, s.spare, s.fast_decode) != (first.format, first.spare, first.fast_decode) for s in stages):
        raise ValueError("stages that embed together share format, spare and fast_decode")
    encoders = [_encoder(stage, machine) for stage in stages]
    framings = list(dict.fromkeys(encoder.framing for encoder in encoders))
    frame = framer(framings, first.fast_decode)
    rules = [rule.build(machine) for rule in first.spare]
    images = FORMATS[first.format].images

    def function(files: Files, samples: Rows, columns: Rows | None = None) -> list[Made]:
        table, clock = samples.table(), Clock()
        wanted_M = _wanted(table, columns, rules)
        halved = [encoder.halved for encoder in encoders]
        problems: dict[int, Undecodable] = {}
        decoded: list[int] = []
        parts: list[list[Float32s]] = [[] for _ in encoders]
        started: list[Callable[[], Float32s]] = []

        stored = clock.each("read", images(files, table.take(pa.array(wanted_M))))
        framed = ahead(clock.work("decode", frame), stored, machine.decoders, 2 * machine.image_batch)
        numbered = zip(wanted_M.tolist(), framed, strict=True)
        for batch in _batches(numbered, machine.image_batch, decoded, problems):
            with clock.on("image"):
                stacked = {framing: np.stack([f[at] for f in batch]) for at, framing in enumerate(framings)}
                # A GPU computes one batch while the next is decoded: results are asked for one batch late.
                launched = [encoder.images(stacked[encoder.framing]) for encoder in encoders]
                _collect(started, parts)
                started = launched
        with clock.on("image"):
            _collect(started, parts)

        captions = table["caption"].take(pa.array(decoded, pa.int64())).to_pylist()
        made = []
        for encoder, before, image in zip(encoders, halved, parts, strict=True):
            with clock.on("text"):
                text_MD = encoder.texts(captions, machine.text_batch)
            image_MD = np.concatenate([np.empty((0, encoder.dims), np.float32), *image])
            rows, ok_M = _table(len(table), decoded, image_MD, text_MD, problems)
            facts = {"rows": len(table), "embedded": int(ok_M.sum()), "dims": encoder.dims}
            tables = {"vectors": rows.select(VECTORS), "scores": rows.select(SCORES)}
            made.append(Made(tables, {**facts, "halved": encoder.halved - before}))
        log.info("%d of %d rows embedded by %d models; %s", len(decoded), len(table), len(encoders), clock)
        return [replace(made[0], seconds=clock.phases()), *made[1:]]

    return function


def _encoder(stage: Embed, machine: Machine) -> Encoder:
    """The stage's model, loaded; only where it computes what the key of the stage says."""
    here = numerics(machine)
    if (here.kind, here.precision) != (stage.device_class, stage.precision):
        raise RuntimeError(
            f"{socket.gethostname()} computes in {here.precision} on {here.kind!r}, but the embeddings of "
            f"{stage.model!r} are asked for in {stage.precision} on {stage.device_class!r}"
        )
    arch = None if stage.weights == "tiny" or stage.arch == stage.weights else stage.arch
    weights = resolve(arch, stage.file or stage.weights)
    if weights.sha256 != stage.sha256:
        raise RuntimeError(
            f"{socket.gethostname()} has other weights for {stage.model!r}: {weights.path} has the sha256 "
            f"{weights.sha256}, not {stage.sha256}"
        )
    return Encoder(weights, here, machine.threads)


def framer(framings: Sequence[Framing], fast: bool) -> Callable[[bytes | None], Framed]:
    """A function that decodes one stored image and cuts it for each framing; it never raises, and may run in threads.

    Args:
        framings: what the models need.
        fast: whether a JPEG may be decoded at a fraction of its size, as long as it stays larger than every frame, and
            an image be cut before it is resized.
    """
    steps = [framing.build(fast) for framing in framings]
    at_least_px = max(side for framing in framings for side in framing.size) if fast else None

    def frame(stored: bytes | None) -> Framed:
        if stored is None:
            return Undecodable("missing_image", "")
        image = decode_rgb(stored, at_least_px)
        if isinstance(image, Undecodable):
            return image
        try:
            return tuple(step(image) for step in steps)
        except (ValueError, OSError, MemoryError) as error:
            width, height = size_px(image)
            return Undecodable("unreadable_image", f"{width} x {height} px: {error}"[:200])

    return frame


def ahead(work: Callable[[T], R], values: Iterable[T], threads: int, window: int) -> Iterator[R]:
    """`map` in order, with at most `window` values taken but not yet given out; in line where there are no threads."""
    if threads == 0:
        yield from map(work, values)
        return
    with ThreadPoolExecutor(threads, "decode") as pool:
        waiting: deque[Future[R]] = deque()
        for value in values:
            waiting.append(pool.submit(work, value))
            if len(waiting) >= window:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _wanted(
    samples: pa.Table, columns: Rows | None, rules: Sequence[Callable[[pa.Table, pa.Table], Any]]
) -> np.ndarray[Any, np.dtype[np.int64]]:
    """int64 (M,): rows without a problem that no leading rule drops; each rule judges what the ones before it left."""
    row_M = np.flatnonzero(~valid(samples["problem"]))
    own = columns.table() if columns else samples.select([])
    for rule in rules:
        taken = pa.array(row_M)
        row_M = row_M[~valid(rule(samples.take(taken), own.take(taken)).reason)]
    return row_M


def _batches(
    numbered: Iterable[tuple[int, Framed]], size: int, decoded: list[int], problems: dict[int, Undecodable]
) -> Iterator[list[tuple[Uint8s, ...]]]:
    """Frames of `size` images at a time, in row order; notes which rows they are of, and the problems of others."""
    batch = []
    for row, framed in numbered:
        if isinstance(framed, Undecodable):
            problems[row] = framed
            continue
        decoded.append(row)
        batch.append(framed)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _collect(started: Sequence[Callable[[], Float32s]], parts: Sequence[list[Float32s]]) -> None:
    for result, part in zip(started, parts, strict=False):
        part.append(result())


def _table(
    rows: int, decoded: Sequence[int], image_MD: Float32s, text_MD: Float32s, problems: dict[int, Undecodable]
) -> tuple[pa.Table, Bools]:
    """Vectors of the decoded rows as schema.embeddings of all rows; and bool (M,), which decoded rows have both."""
    image16_MD, image_ok_M = unit16(image_MD)
    text16_MD, text_ok_M = unit16(text_MD)
    ok_M = image_ok_M & text_ok_M
    problem: list[str | None] = [None] * rows
    detail: list[str | None] = [None] * rows
    for row, found in problems.items():
        problem[row], detail[row] = found.reason, found.detail
    for at in np.flatnonzero(~ok_M).tolist():
        side = "text" if image_ok_M[at] else "image"
        problem[decoded[at]], detail[decoded[at]] = "bad_vector", f"the {side} vector is zero or not finite"
    ok_N = np.zeros(rows, np.bool_)
    ok_N[np.array(decoded, np.int64)[ok_M]] = True
    dims = image_MD.shape[1]
    columns = {}
    for name, vec16_MD in (("image", image16_MD), ("text", text16_MD)):
        vec16_ND = np.zeros((rows, dims), np.float16)
        vec16_ND[ok_N] = vec16_MD[ok_M]
        columns[name] = fixed(vec16_ND, ok_N)
    score_N = np.zeros(rows, np.float32)
    score_N[ok_N] = row_cosine(image16_MD[ok_M], text16_MD[ok_M])
    columns["score"] = pa.array(score_N, mask=~ok_N)
    columns["problem"] = pa.array(problem, pa.string())
    columns["detail"] = pa.array(detail, pa.string())
    return pa.table(columns, embeddings(dims)), ok_M


class Clock:
    """Where the time of one unit went, by phase (costs.PHASES): waited for, but decoding in seconds of its threads."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._lock = Lock()

    @contextmanager
    def on(self, what: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[what] += time.perf_counter() - start

    def each(self, what: str, values: Iterator[T]) -> Iterator[T]:
        """The same values; the clock runs while the next one is waited for."""
        while True:
            with self.on(what):
                try:
                    value = next(values)
                except StopIteration:
                    return
            yield value

    def work(self, what: str, do: Callable[[T], R]) -> Callable[[T], R]:
        """The same function, which may run in threads; what counts is the processor's time."""

        def timed(value: T) -> R:
            start = time.thread_time()
            result = do(value)
            spent = time.thread_time() - start
            with self._lock:
                self.seconds[what] += spent
            return result

        return timed

    def phases(self) -> dict[str, float]:
        """Seconds of what embedding consists of."""
        return {what: self.seconds[what] for what in ("read", "decode", "image", "text")}

    def __str__(self) -> str:
        return ", ".join(f"{what} {spent:.2f} s" for what, spent in self.phases().items())
