"""What a stage is: parameters that are identity, and a function from the rows of parts to new tables.

A stage is a frozen dataclass. Its fields, `name` and `version` enter the key of everything it makes. `build(machine)`
loads what the stage needs, once per worker, and returns the function that is called for each unit (or group of units).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import pyarrow as pa

from pipeline.machine import Machine


class Sink(Protocol):
    """A file being written."""

    def write(self, data: bytes) -> object:
        """Append to it."""


@dataclass(frozen=True)
class Made:
    """What a stage made of one part: named tables, and a few facts small enough for a receipt.

    Attributes:
        tables: output name -> rows; the names are the stage's `outputs`.
        facts: JSON values (counts, totals); deterministic, a few hundred bytes.
        buckets: None, or a number of destinations: the tables then have an int32 column `to` in [0, buckets), and are
            stored so that each destination's rows can be read alone (Dataset.shuffled). Rows too large to hold at once
            are an iterator of tables.
        exports: path below the run directory -> what writes that file's bytes, in order; for stages of Run.export.
        seconds: where the time went (costs.PHASES); told to who watches the run, and in no file but times.json.
    """

    tables: Mapping[str, pa.Table | Iterator[pa.Table]]
    facts: dict[str, Any] = field(default_factory=dict)
    buckets: int | None = None
    exports: dict[str, Callable[[Sink], object]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


class Rows(Protocol):
    """Committed rows of one input part, read when asked, each file checked against its digest."""

    @property
    def facts(self) -> Sequence[dict[str, Any]]:
        """The facts of each committed file of the part, in order."""

    @property
    def given(self) -> dict[str, Any]:
        """Small values that the driver passes along with the part."""

    @property
    def lengths(self) -> Sequence[int]:
        """Rows of each committed file of the part, in order, without reading them."""

    def table(self, columns: Sequence[str] | None = None) -> pa.Table:
        """All rows of the part, or only the named columns; without any column where nothing was sent to a bucket."""

    def pieces(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """The same rows, one committed file at a time: for inputs too large to hold at once."""


@dataclass(frozen=True)
class Source:
    """One input file of a unit, as listed.

    Attributes:
        url: where it is.
        bytes: its length as listed.
        etag: the store's etag, else the modification time; tells a changed file from the same one.
    """

    url: str
    bytes: int
    etag: str


@dataclass(frozen=True)
class Unit:
    """One input shard: the unit of work, of retry and of resume.

    Attributes:
        shard: path of its main file below the pool's common folder, such as `00000.tar`; unique in the pool.
        sources: role -> file, such as {"tar": ..., "sidecar": ...}; roles are the pool format's.
    """

    shard: str
    sources: dict[str, Source]


@dataclass(frozen=True)
class LocalFile:
    """A file of a unit at hand: on the local disk and decompressed.

    Attributes:
        path: local path; read only.
        bytes: length of the decompressed file.
        sha256: hex digest of the stored bytes, after `gunzip ` where they were decompressed; empty but on the first
            read of the unit.
        damage: why the stored bytes could not be decompressed to their end, or None.
    """

    path: str
    bytes: int
    sha256: str
    damage: str | None = None


class Files(Protocol):
    """The files of one unit, fetched when first asked for."""

    def __contains__(self, role: str) -> bool:
        """Whether the unit has a file in this role."""

    def open(self, role: str) -> LocalFile:
        """The file, downloaded and decompressed if need be.

        Raises:
            OSError: storage would not give it, or gave another length than listed.
        """

    def read(self, role: str, ranges: Sequence[tuple[int, int]]) -> Iterator[bytes]:
        """The bytes [start, stop) of the (decompressed) file for each range, without fetching the rest.

        Raises:
            OSError: as `open`.
        """


Function = Callable[..., Made]
"""Called with the unit's Files first where the stage reads the pool, then one Rows per input dataset."""


class Stage(Protocol):
    """The shape of every stage; a frozen dataclass has it without inheriting.

    Attributes:
        name: a noun or verb of the glossary; a folder of the store.
        version: raised when the meaning of the stage changes, so that old parts are not served.
        outputs: names of the tables that it makes.
        exact: whether equal inputs give equal bytes on every machine; a forward pass does not.
    """

    name: ClassVar[str]
    version: ClassVar[int]
    outputs: ClassVar[tuple[str, ...]]
    exact: ClassVar[bool]

    def build(self, machine: Machine) -> Function:
        """Load what is needed once per worker; the function then serves any number of parts."""
