"""Rows to look at: ordinals in the pool in; shard, key, caption and a small picture of each out, and words of concepts.

Only the shards of the chosen rows are opened. What cannot be had is missing, and never an error.
"""

from __future__ import annotations

import base64
import io
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from pipeline.executor import Failure, attempt
from pipeline.images import Undecodable, decode
from pipeline.machine import Machine
from pipeline.pool import FORMATS, Pool, list_units
from pipeline.record import AsRead, batches, decisions_of, rows_of
from pipeline.stage import Unit
from pipeline.storage import Root, UnitFiles

SIDE_PX = 96
JPEG_QUALITY = 72
MAX_PICTURE_BYTES = 5 << 20
"""Of all pictures together, as text: index.html stays below 8 MB."""

SPOKEN_ROWS = 200_000
"""Most captions that the words of concepts are counted in."""

WORDS = 6
MAX_CAPTION_CHARS = 160
WORD = re.compile(r"[^\W\d_]{2,}")


@dataclass(frozen=True)
class Seen:
    """One row as it is shown.

    Attributes:
        uid, shard, key: as in decisions.
        caption: its start, or None where the store does not give it.
        picture: data: URI of a JPEG of at most SIDE_PX, or None.
    """

    uid: str
    shard: str
    key: str
    caption: str | None = None
    picture: str | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Identity:
    """A row of decisions."""

    uid: str
    shard: str
    key: str


def identify(
    directory: Root, rows: Iterable[int], uids: Iterable[str]
) -> tuple[dict[int, Identity], dict[str, list[int]]]:
    """Find rows by ordinal, and the first two rows of each uid (equal pairs have equal uids).

    Raises:
        Unreadable: a part of decisions is missing or damaged.
    """
    wanted, named = np.array(sorted(set(rows)), np.int64), pa.array(sorted(set(uids)), pa.string())
    found: dict[int, Identity] = {}
    rows_of_uid: dict[str, list[int]] = defaultdict(list)
    first = 0
    for path in decisions_of(directory):
        for table in batches(directory, path, ["uid", "shard", "key"]):
            here = wanted[np.searchsorted(wanted, first) : np.searchsorted(wanted, first + len(table))] - first
            equal = np.flatnonzero(pc.is_in(table.column("uid"), named)) if len(named) else np.zeros(0, np.int64)
            twins = np.zeros(len(table), bool)
            for position, uid in zip(
                equal.tolist(), table.column("uid").take(pa.array(equal)).to_pylist(), strict=True
            ):
                if len(rows_of_uid[uid]) < 2:
                    rows_of_uid[uid].append(first + position)
                    twins[position] = True
            at = np.union1d(here, np.flatnonzero(twins))
            for position, values in zip(at.tolist(), table.take(pa.array(at)).to_pylist(), strict=True):
                found[first + position] = Identity(**values)
            first += len(table)
    return found, dict(rows_of_uid)


def spoken_units(read: AsRead) -> list[int]:
    """Evenly spread units that hold about SPOKEN_ROWS rows."""
    return list(range(0, len(read.samples), max(1, -(-sum(read.rows) // SPOKEN_ROWS))))


def ranges_of(read: AsRead, units: Sequence[int]) -> list[range]:
    """Rows of some units, as ordinals in the pool."""
    starts = [0, *accumulate(read.rows)]
    return [range(starts[u], starts[u + 1]) for u in units]


def look(
    rows: Mapping[int, Identity], store: Root, read: AsRead, pool: Pool, machine: Machine
) -> tuple[dict[int, Seen], str | None]:
    """Captions from the store, pictures from the pool.

    Args:
        rows: ordinal -> identity.
        store: of the run.
        read: the pool as it was read; empty where the store cannot be read.
        pool: as the recipe has it.
        machine: how storage is reached.

    Returns:
        The rows as they are shown, and why pictures are missing, if they are.
    """
    seen = {row: Seen(i.uid, i.shard, i.key) for row, i in rows.items()}
    if not read.samples:
        return seen, None
    listed = attempt(lambda p: {u.shard: u for u in list_units(p, machine.storage_options)}, pool)
    units: dict[str, Unit] = {} if isinstance(listed, Failure) else listed
    starts = np.cumsum([0, *read.rows])
    by_unit: dict[int, list[int]] = defaultdict(list)
    for row in sorted(rows):
        by_unit[int(np.searchsorted(starts, row, side="right")) - 1].append(row)
    left, failed = MAX_PICTURE_BYTES, 0
    for unit, mine in by_unit.items():
        samples = rows_of(store, read.samples[unit]).take(pa.array(np.array(mine) - starts[unit]))
        shard = units.get(rows[mine[0]].shard)
        pictures = attempt(partial(_pictures, samples, pool.format, machine), shard) if shard else None
        if pictures is None or isinstance(pictures, Failure):
            failed += 1
            pictures = [None] * len(mine)
        for row, caption, picture in zip(mine, samples.column("caption").to_pylist(), pictures, strict=True):
            kept = picture if picture and len(picture) <= left else None
            left -= len(kept or "")
            seen[row] = Seen(seen[row].uid, seen[row].shard, seen[row].key, shortened(caption), kept)
    if isinstance(listed, Failure):
        return seen, f"The pool could not be listed ({listed.cause.partition(':')[0]}), so there are no pictures here."
    if failed:
        return seen, f"{failed} of the {len(by_unit)} shards with rows shown here could not be read for pictures."
    if not any(s.picture for s in seen.values()):
        return seen, "This pool has no images; rows are shown by their captions."
    return seen, None


def shortened(caption: str | None) -> str | None:
    """The start of a caption."""
    if caption is None or len(caption) <= MAX_CAPTION_CHARS:
        return caption
    return caption[:MAX_CAPTION_CHARS] + "…"


def _pictures(samples: pa.Table, pool_format: str, machine: Machine, unit: Unit) -> list[str | None]:
    with UnitFiles(unit, machine) as files:
        return [thumbnail(data) if data else None for data in FORMATS[pool_format].images(files, samples)]


def thumbnail(data: bytes) -> str | None:
    """A stored image as the data: URI of a JPEG of at most SIDE_PX on white; None where it cannot be decoded."""
    image = decode(data, SIDE_PX)
    if isinstance(image, Undecodable):
        return None
    layer = image.convert("RGBA")
    layer.thumbnail((SIDE_PX, SIDE_PX), reducing_gap=2.0)
    flat = Image.new("RGB", layer.size, "white")
    flat.paste(layer, mask=layer.getchannel("A"))
    out = io.BytesIO()
    flat.save(out, "JPEG", quality=JPEG_QUALITY, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()


def captions_of(store: Root, read: AsRead, units: Sequence[int]) -> list[str]:
    """Captions of all rows of some units, empty where there is none."""
    found: list[str] = []
    for unit in units:
        column = rows_of(store, read.samples[unit], ["caption"]).column("caption")
        found += pc.fill_null(column, "").to_pylist()
    return found


def characteristic(captions: Sequence[str], cluster_N: np.ndarray, shown: Sequence[int]) -> dict[int, list[str]]:
    """Words that captions of a cluster have more often than the others: highest z-score of the log-odds ratio.

    A word counts once for each caption. Words in more than a tenth of all captions say nothing and are left out, and
    so are words in fewer than two captions of the cluster.

    Args:
        captions: of N rows.
        cluster_N: int (N,).
        shown: the clusters that are asked for.

    Returns:
        Cluster -> at most WORDS words, best first, ties in alphabetical order.

    Source: Monroe, Colaresi and Quinn 2008, "Fightin' Words", with 0.5 as the prior.
    """
    wanted = set(shown)
    every: Counter[str] = Counter()
    inside: dict[int, Counter[str]] = {c: Counter() for c in shown}
    for caption, cluster in zip(captions, cluster_N.tolist(), strict=True):
        words = set(WORD.findall(caption.lower()))
        every.update(words)
        if cluster in wanted:
            inside[cluster].update(words)
    sizes = Counter(cluster_N.tolist())
    total = len(captions)

    def z_score(here: int, all_: int, size: int) -> float:
        there, others = all_ - here + 0.5, total - size
        odds = math.log((here + 0.5) / (size - here + 0.5)) - math.log(there / (others - all_ + here + 0.5))
        return odds / math.sqrt(1 / (here + 0.5) + 1 / there)

    found = {}
    for cluster, counts in inside.items():
        telling = {w: n for w, n in counts.items() if n >= 2 and every[w] <= max(2, total / 10)}
        scored = sorted((-z_score(n, every[w], sizes[cluster]), w) for w, n in telling.items())
        found[cluster] = [word for z, word in scored[:WORDS] if z < 0]
    return found
