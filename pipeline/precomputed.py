"""Vectors that the pool brings along: arrays of a unit in, the same table out that embedding would make."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pyarrow as pa

from pipeline.arrow import fixed
from pipeline.errors import UserError
from pipeline.formats import clip_retrieval, datacomp
from pipeline.formats.metadata import MetadataError
from pipeline.machine import Machine
from pipeline.schema import SAMPLES, SCORES, VECTORS, embeddings
from pipeline.stage import Files, Function, Made, Rows
from pipeline.vectors import row_cosine, unit16

LAYOUTS = {"datacomp": datacomp, "clip_retrieval": clip_retrieval}


@dataclass(frozen=True)
class Precomputed:
    """Evidence from arrays of the pool.

    Attributes:
        image: name of the array of image vectors, such as `l14_img`.
        text: name of the array of text vectors; None: the model gives no score.
        format: of the pool, `datacomp` or `clip_retrieval`.
        dims: D of these vectors (`find_dims`), so that a unit whose arrays are damaged still has the others' schema.
    """

    image: str
    text: str | None
    format: str
    dims: int
    name: ClassVar[str] = "precomputed"
    version: ClassVar[int] = 2
    outputs: ClassVar[tuple[str, ...]] = ("vectors", "scores")
    exact: ClassVar[bool] = True

    def build(self, machine: Machine) -> Function:
        """A function from the unit's Files and samples to schema.embeddings(dims), one row per sample.

        Every sample without a problem has vectors, unless one of its own is not finite or zero, or its unit has no
        usable array: then all are null, and the problem is `bad_vector` with the array's name.
        """

        def function(files: Files, samples: Rows) -> Made:
            return self._embed(files, samples.table(["problem", "source_row"]))

        return function

    def _embed(self, files: Files, samples: pa.Table) -> Made:
        rows = len(samples)
        usable_N = samples["problem"].is_null().to_numpy()
        detail_N: list[str | None] = [None] * rows
        vec: dict[str, np.ndarray] = {}
        for side, name in (("image", self.image), ("text", self.text)):
            vec_ND = np.zeros((rows, self.dims), np.float16)
            found_N = np.zeros(rows, np.bool_)
            fault = "no array"
            if name is not None:
                try:
                    vec_ND, found_N = unit16(_vectors(self.format, files, name, samples, self.dims))
                    fault = f"{name}: not finite, or zero"
                except (MetadataError, UserError) as error:  # find_dims saw the array in another unit
                    fault = f"{name}: {error}"
                for row in np.flatnonzero(usable_N & ~found_N):
                    detail_N[row] = detail_N[row] or fault
            vec[side] = vec_ND
        ok_N = usable_N & np.array([detail is None for detail in detail_N], np.bool_)
        both_N = ok_N if self.text else np.zeros(rows, np.bool_)
        score_N = row_cosine(vec["image"], vec["text"]) if self.text else np.zeros(rows, np.float32)
        bad_N = usable_N & ~ok_N
        table = pa.table(
            {
                "image": fixed(vec["image"], ok_N),
                "text": fixed(vec["text"], both_N),
                "score": pa.array(score_N, mask=~both_N),
                "problem": pa.array(np.where(bad_N, "bad_vector", ""), pa.string(), mask=~bad_N),
                "detail": pa.array(detail_N, pa.string()),
            },
            schema=embeddings(self.dims),
        )
        tables = {"vectors": table.select(VECTORS), "scores": table.select(SCORES)}
        return Made(tables, {"rows": rows, "embedded": int(ok_N.sum()), "dims": self.dims})


def find_dims(format: str, image: str, text: str | None, units: Iterable[Files]) -> int:
    """D of a model's precomputed vectors, from the first unit that has all its arrays.

    Raises:
        UserError: the layout has no arrays, none of this name, two with different D, or no unit has usable ones.
    """
    if format not in LAYOUTS:
        raise UserError(f"models: only {' and '.join(LAYOUTS)} pools bring arrays of vectors, not {format}")
    names = [image] if text is None else [image, text]
    for files in units:
        try:
            found = [LAYOUTS[format].vectors(files, name, SAMPLES.empty_table()).shape[1] for name in names]
        except MetadataError:
            continue
        if len(set(found)) > 1:
            raise UserError(f"models: {image} has {found[0]} dimensions, {text} has {found[1]}")
        return int(found[0])
    raise UserError(f"models: no file of the pool has a usable array {' or '.join(names)}")


def _vectors(format: str, files: Files, name: str, samples: pa.Table, dims: int) -> np.ndarray:
    vec_ND: np.ndarray = LAYOUTS[format].vectors(files, name, samples)
    if vec_ND.shape[1] != dims:
        raise MetadataError(f"{vec_ND.shape[1]} dimensions, {dims} in other files")
    return vec_ND
