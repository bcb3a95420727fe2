"""Held-out pairs and what they tell of a model: a split by content, AUC and recall.

In: captions, images and vectors of pairs. Out: which pairs to keep out of training, and Figures. No files, no torch.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from pipeline.errors import UserError

Floats = npt.NDArray[np.floating[Any]]

DRAWS = 10
"""Mismatched captions drawn for each held-out image: ten keep the noise of an AUC on 1,000 images below 0.01."""
RECALL_POOL = 500

_VARYING = frozenset(
    """a an the of with and in on by for to man men woman women person people boy girl male female skin tone light
    medium dark left right up down""".split()  # noqa: SIM905
)
"""Words by which captions of one thing vary, in the language of most pools."""


def caption_stem(caption: str) -> str:
    """What variants of a caption share: its letters before a colon, without digits and the words that only vary it.

    'woman singer: dark skin tone' and 'man singer' give 'singer'; 'Slot machine 2' and 'slotmachine' agree too.
    """
    for part in (caption.split(":")[0], caption):
        words = re.findall(r"[^\W\d_]+", part.lower())
        if stem := "".join(word for word in words if word not in _VARYING):
            return stem
    return caption.strip().lower()


def perceptual_hash(image: Image.Image) -> int:
    """64 bits that near-copies share but for a few: the lowest 8 x 8 cosine frequencies against their median."""
    pixels = np.asarray(image.convert("L").resize((32, 32), Image.Resampling.LANCZOS), np.float64)
    wave = np.cos(np.pi / 32 * np.outer(np.arange(8), np.arange(32) + 0.5))
    low = (wave @ pixels @ wave.T).ravel()
    # The constant term is the brightness, which a near-copy may change.
    bits = low > np.median(low[1:])
    bits[0] = False
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def content_groups(stems: Sequence[str], hashes: Sequence[int], max_bits: int = 6) -> list[int]:
    """Group pairs that share a caption stem, or whose images differ in at most `max_bits` bits, directly or in a chain.

    Args:
        stems: caption stems, one a pair.
        hashes: perceptual hashes, 64 bits, one a pair.
        max_bits: near-copies by resizing, recompression and brightness lie within 6 bits.

    Returns:
        For each pair the lowest index in its group.
    """
    parent = list(range(len(stems)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    def join(i: int, j: int) -> None:
        low, high = sorted((root(i), root(j)))
        parent[high] = low

    first: dict[str | int, int] = {}
    for i, (stem, value) in enumerate(zip(stems, hashes, strict=True)):
        join(i, first.setdefault(stem, i))
        join(i, first.setdefault(value, i))
    distinct = sorted(set(hashes))
    # Of max_bits + 1 bands at least one is equal in two hashes that differ in at most max_bits bits.
    width = math.ceil(64 / (max_bits + 1))
    for shift in range(0, 64, width):
        bands: dict[int, list[int]] = {}
        for value in distinct:
            bands.setdefault(value >> shift & (1 << width) - 1, []).append(value)
        for band in bands.values():
            values = np.array(band, np.uint64)
            for i in range(len(band) - 1):
                bits = np.unpackbits((values[i + 1 :] ^ values[i]).view(np.uint8).reshape(-1, 8), axis=1).sum(axis=1)
                for j in np.flatnonzero(bits <= max_bits):
                    join(first[band[i]], first[band[i + 1 + int(j)]])
    return [root(i) for i in range(len(stems))]


def hold_out(groups: Sequence[int], names: Sequence[str], fraction: float, seed: int) -> npt.NDArray[np.bool_]:
    """Choose whole groups, in the order of a hash, until `fraction` of the pairs is held out.

    A group of more than 1% of the pairs (one caption on hundreds of images) stays in training: it would swamp the rest.

    Args:
        groups: the group of each pair.
        names: a stable name of each pair (its key); a group goes by the least.

    Returns:
        bool, shape (N,): True where held out.
    """
    members: dict[int, list[int]] = {}
    for i, group in enumerate(groups):
        members.setdefault(group, []).append(i)
    small = [rows for rows in members.values() if len(rows) <= max(1, len(groups) // 100)]
    small.sort(key=lambda rows: hashlib.sha256(f"{seed}/{min(names[i] for i in rows)}".encode()).digest())
    held = np.zeros(len(groups), bool)
    for rows in small:
        if held.sum() + len(rows) <= fraction * len(groups):
            held[rows] = True
    return held


def auc(matched: Floats, mismatched: Floats) -> float:
    """Probability that a matched pair scores above a mismatched one, ties counting half."""
    order = np.sort(mismatched)
    below = np.searchsorted(order, matched, "left") + np.searchsorted(order, matched, "right")
    return float(below.mean() / 2 / len(order))


def recall_at(cos_NN: Floats, k: int) -> float:
    """Share of rows (images) whose own column (text) is among their k largest cosines; ties count against it."""
    own_N = cos_NN.diagonal()[:, None]
    return float(((cos_NN >= own_N).sum(axis=1) <= k).mean())


@dataclass(frozen=True)
class Figures:
    """How a model does on held-out pairs. AUC: matched against mismatched pairs; recall: image to text."""

    pairs: int
    groups: int
    auc_inside: float
    auc_across: float
    auc_by_source: dict[str, float]
    recall_pool: int
    recall_1: float
    recall_5: float


def held_out_figures(image_ND: Floats, text_ND: Floats, sources: Sequence[str], groups: Sequence[int]) -> Figures:
    """Score held-out pairs against captions of other groups, drawn inside the pair's source and across all.

    Args:
        image_ND, text_ND: float32, unit rows.
        sources: each pair's source; a pair whose source has no other group counts in `across` only.
        groups: each pair's content group; a caption of the same group is never a mismatch.

    Raises:
        UserError: no source has pairs of two groups.
    """
    image_ND, text_ND = image_ND.astype(np.float64), text_ND.astype(np.float64)
    source_N, group_N = np.array(sources), np.array(groups)
    matched_N = (image_ND * text_ND).sum(axis=1)
    rng = np.random.default_rng(0)
    inside_ND, across_ND = (np.full((len(group_N), DRAWS), np.nan) for _ in range(2))
    for i in range(len(group_N)):
        other_N = group_N != group_N[i]
        for cos_ND, rows in ((inside_ND, other_N & (source_N == source_N[i])), (across_ND, other_N)):
            if rows.any():
                cos_ND[i] = text_ND[rng.choice(np.flatnonzero(rows), DRAWS)] @ image_ND[i]
    measured_N = ~np.isnan(inside_ND[:, 0])
    if not measured_N.any():
        raise UserError("recipe.data.held_out: too few held-out pairs to measure; hold out more, or 0 for none")
    by_source = {str(name): measured_N & (source_N == name) for name in np.unique(source_N[measured_N])}
    one_per_group = np.unique(group_N, return_index=True)[1]
    rows = rng.permutation(one_per_group)[:RECALL_POOL]
    cos_RR = image_ND[rows] @ text_ND[rows].T
    return Figures(
        pairs=len(group_N),
        groups=len(one_per_group),
        auc_inside=auc(matched_N[measured_N], inside_ND[measured_N].ravel()),
        auc_across=auc(matched_N, across_ND.ravel()),
        auc_by_source={name: auc(matched_N[rows], inside_ND[rows].ravel()) for name, rows in by_source.items()},
        recall_pool=len(rows),
        recall_1=recall_at(cos_RR, 1),
        recall_5=recall_at(cos_RR, 5),
    )
