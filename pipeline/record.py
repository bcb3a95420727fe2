"""What a finished run wrote down about itself, for those who look at it later: the readers of a run directory.

In: the root of a run directory, and of its store. Out: its files as values, a part of a table at a time.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import parse_yaml
from pipeline.errors import PairsieveError, UserError
from pipeline.parts import Listed, Part, StoredRows
from pipeline.recipe import Recipe, recipe_of
from pipeline.run import MANIFESTS, Receipt, files_of, in_order
from pipeline.storage import Root, redacted

BATCH_ROWS = 1 << 16


HIDDEN = {
    ord(c): "\N{REPLACEMENT CHARACTER}"
    for c in "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\ufeff"
}
"""Characters that turn the direction of what follows."""


def shown(text: Any) -> str:
    """Strangers' text without characters that move or hide other text: controls and bidirectional marks."""
    cleaned = str(text).translate(HIDDEN)
    return "".join(" " if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") else c for c in cleaned)


class Unreadable(PairsieveError):
    """A file of a run directory or a store is missing, or is not what its name says."""

    def __init__(self, path: str, why: str) -> None:
        super().__init__(f"{path}: {why}")
        self.path = path
        self.why = why


@dataclass(frozen=True)
class Record:
    """The record of a finished run.

    Attributes:
        recipe: as resolved.
        about: run.json.
        manifests: path in the store of the manifest of every dataset that the run used.
    """

    recipe: Recipe
    about: dict[str, Any]
    manifests: tuple[str, ...]

    @property
    def funnel(self) -> list[tuple[str, int, int]]:
        """Step, rows that entered, rows that left."""
        return [(step, entered, left) for step, entered, left in self.about["funnel"]]

    def manifest(self, stage: str) -> str:
        """The manifest of the last dataset of a stage that was asked for."""
        return [path for path in self.manifests if path.startswith(f"{MANIFESTS}/{stage}/")][-1]


def load_record(directory: Root) -> Record:
    """Read recipe.yaml and run.json.

    Raises:
        UserError: the folder holds no finished run.
        Unreadable: one of the two is damaged.
    """
    try:
        recipe, about = directory.read("recipe.yaml"), directory.read("run.json")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"{redacted(directory.url)}: no finished run is here ({error.filename or error})") from None
    try:
        plain = parse_yaml(recipe.decode(), "recipe.yaml")
        parsed = json.loads(about)
        return Record(recipe_of(plain), parsed, tuple(f"{MANIFESTS}/{key}.parquet" for key in parsed["datasets"]))
    except (ValueError, KeyError, TypeError, UserError) as error:
        raise Unreadable("recipe.yaml or run.json", f"damaged: {error}") from None


def receipts_of(store: Root, manifest: str) -> Iterator[Receipt]:
    """The receipts of a dataset, in the order of its parts.

    Raises:
        Unreadable: the manifest is missing or damaged.
    """
    try:
        yield from in_order(store.read(manifest))
    except FileNotFoundError:
        raise Unreadable(manifest, "not in the store") from None
    except ValueError as error:
        raise Unreadable(manifest, str(error)) from None


@dataclass(frozen=True)
class AsRead:
    """The pool as it was read: one part of each for each shard, named after it.

    Attributes:
        samples, columns: as stage `read` gave them.
    """

    samples: Sequence[Part] = ()
    columns: Sequence[Part] = ()

    @property
    def rows(self) -> list[int]:
        """Of each shard."""
        return [file.rows for part in self.samples for file in part.files]


def as_read(store: Root, record: Record) -> AsRead:
    """What a finished run read.

    Raises:
        Unreadable: the manifest is missing or damaged.
    """
    names: list[str] = []
    manifest = record.manifest("read")

    def named() -> Iterator[Receipt]:
        for receipt in receipts_of(store, manifest):
            names.append(receipt["name"])
            yield receipt

    try:
        files = files_of("read", ("samples", "columns"), named(), record.about["shards"])
    except ValueError:
        raise Unreadable(manifest, f"it does not hold {record.about['shards']} shards") from None
    return AsRead(*(Listed(names, files[output]) for output in ("samples", "columns")))


def rows_of(store: Root, part: Part, columns: Sequence[str] | None = None) -> pa.Table:
    """The rows of a part.

    Raises:
        Unreadable: its file is missing.
        DamagedPart: it holds other bytes.
    """
    try:
        return StoredRows(store, part).table(columns)
    except FileNotFoundError:
        raise Unreadable(part.files[0].path, "not in the store") from None


def batches(directory: Root, path: str, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
    """The rows of a parquet file, BATCH_ROWS at a time.

    Raises:
        Unreadable: it is missing, is not parquet, or lacks a column.
    """
    try:
        with directory.open(path) as file, pq.ParquetFile(file) as table:
            lacking = set(columns or ()) - set(table.schema_arrow.names)
            if lacking:
                raise Unreadable(path, f"no column {sorted(lacking)[0]}")
            for batch in table.iter_batches(BATCH_ROWS, columns=list(columns) if columns is not None else None):
                yield pa.Table.from_batches([batch])
    except FileNotFoundError:
        raise Unreadable(path, "missing") from None
    except (pa.ArrowInvalid, OSError) as error:
        raise Unreadable(path, f"cannot be read: {' '.join(str(error).split())}") from None


def parts_of(directory: Root, folder: str, suffix: str = ".parquet") -> list[str]:
    """The files of one kind in a folder of the run directory, in order."""
    return [path for path in directory.list(folder) if path.endswith(suffix)]


def decisions_of(directory: Root) -> list[str]:
    """The parts of decisions, in order.

    Raises:
        Unreadable: there is none, which no finished run has.
    """
    parts = parts_of(directory, "decisions")
    if not parts:
        raise Unreadable("decisions", "missing")
    return parts
