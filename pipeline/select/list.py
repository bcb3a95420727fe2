"""list: keep only what a list names, or drop what it names.

A list is a parquet file with the column `on`, a text file with a value a line, or a DataComp subset (.npy of u8,u8
uids). It is known by its content, never by where it lies.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import field, replace
from typing import Literal, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import model_validator
from pydantic.dataclasses import dataclass

from pipeline.arrow import unfixed
from pipeline.errors import UserError
from pipeline.formats.metadata import open_parquet, plain
from pipeline.machine import Machine
from pipeline.select.judge import judged
from pipeline.state import Verdict
from pipeline.step import RULE, Outcome, Step
from pipeline.storage import Root, redacted
from pipeline.vectors import Bools, Uint64s, uid_words

SUBSET = np.dtype("u8,u8")
UID = re.compile("[0-9a-fA-F]{32}")


@dataclass(frozen=True, config=RULE)
class List:
    """Drop rows by membership in a list.

    Attributes:
        deny: URL of the list whose members are dropped (`denied`).
        allow: URL of the list whose members alone are kept (`not_allowed`).
        on: what the list holds; compared as text, uids and sha256 in lower case.
        sha256: digest of the list's file; filled in when the run starts, and checked where the recipe gives it.
    """

    deny: str | None = field(default=None, metadata={"place": True})
    allow: str | None = field(default=None, metadata={"place": True})
    on: Literal["uid", "url", "sha256", "key"] = "uid"
    sha256: str | None = None

    @model_validator(mode="after")
    def _one(self) -> List:
        if (self.deny is None) == (self.allow is None):
            raise ValueError("list needs one of deny and allow")
        return self

    @property
    def url(self) -> str:
        return self.deny or self.allow or ""

    def pinned(self, machine: Machine) -> List:
        """The same rule with the digest of its file.

        Raises:
            UserError: the file cannot be read, or is not the one that the recipe names.
        """
        found = hashlib.sha256(_read(self.url, machine)).hexdigest()
        if self.sha256 not in (None, found):
            raise UserError(f"list: {redacted(self.url)} has sha256 {found}, the recipe says {self.sha256}")
        return replace(self, sha256=found)

    @property
    def reads(self) -> Sequence[str]:
        return (self.on,)

    def uses_columns(self) -> dict[str, pa.DataType]:
        return {}

    def apply(self, step: Step) -> Outcome:
        return judged(step, self)

    def build(self, machine: Machine) -> Callable[[pa.Table, pa.Table], Verdict]:
        listed = Listed.of(members(_read(self.url, machine), self.url, self.on))
        denying = self.deny is not None

        def judge(samples: pa.Table, columns: pa.Table) -> Verdict:
            column = samples.column(self.on)
            words = (
                uid_words(unfixed(column, np.uint8)) if self.on == "uid" else fingerprints(column.to_pylist(), self.on)
            )
            there = among(words, listed)
            drop = pa.array(there if denying else ~there)
            reason = pc.if_else(drop, "denied" if denying else "not_allowed", pa.scalar(None, pa.string()))
            nothing = pa.nulls(samples.num_rows, pa.float64())
            return Verdict(reason, nothing, nothing)

        return judge


Words: TypeAlias = tuple[Uint64s, Uint64s]
"""Of each value: uint64 (N,), twice. A uid is its own two words; any other value has those of its digest."""


@dataclasses.dataclass(frozen=True)
class Listed:
    """The words of a list, and where those of each prefix of the first begin.

    Attributes:
        words: by the first; a value may be there several times.
        shift: bits of a first word below its prefix.
        first_P: int64 (P + 1,): position of the first value of each prefix, and the end.
    """

    words: Words
    shift: np.uint64
    first_P: np.ndarray

    @staticmethod
    def of(words: Words) -> Listed:
        """Of words in any order; so many prefixes that one has two or three values, if these are as good as random."""
        high_M, low_M = words
        if (high_M[1:] < high_M[:-1]).any():  # a subset.npy is in order
            order_M = np.argsort(high_M)
            high_M, low_M = high_M[order_M], low_M[order_M]
        bits = max(1, len(high_M).bit_length() - 1)
        shift = np.uint64(64 - bits)
        counts_P = np.bincount((high_M >> shift).astype(np.int64), minlength=1 << bits)
        return Listed((high_M, low_M), shift, np.concatenate([[0], np.cumsum(counts_P)]))


FEW = 16
"""Values of one prefix up to which they are looked at one by one."""


def among(words: Words, listed: Listed) -> Bools:
    """bool (N,): whether each value is in a list."""
    (high_N, low_N), (high_M, low_M) = words, listed.words
    prefix_N = (high_N >> listed.shift).astype(np.int64)
    at_N = listed.first_P[prefix_N]
    crowded = np.flatnonzero(listed.first_P[prefix_N + 1] - at_N > FEW)
    at_N[crowded] = np.searchsorted(high_M, high_N[crowded])
    there_N = np.zeros(len(at_N), np.bool_)
    row = np.arange(len(at_N))
    while len(row := row[at_N[row] < len(high_M)]):
        found = high_M[at_N[row]]
        row = row[found <= high_N[row]]
        equal = row[high_M[at_N[row]] == high_N[row]]
        there_N[equal[low_M[at_N[equal]] == low_N[equal]]] = True
        at_N[row] += 1
    return there_N


def members(data: bytes, url: str, on: str) -> Words:
    """What a list names.

    Args:
        data: the file.
        url: its name; the ending tells its kind.
        on: the column of a parquet file.

    Raises:
        UserError: the file is not what its name says, or lacks the column.
    """
    where = f"list: {redacted(url)}"
    try:
        if url.endswith(".npy"):
            pairs = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
            if pairs.dtype != SUBSET or on != "uid":
                raise UserError(f"{where}: a .npy list holds u8,u8 uids (found {pairs.dtype}) and needs `on: uid`")
            return np.ascontiguousarray(pairs["f0"].ravel()), np.ascontiguousarray(pairs["f1"].ravel())
        if url.endswith(".parquet"):
            with open_parquet(data) as file:
                if on not in file.schema_arrow.names:
                    raise UserError(f"{where}: no column '{on}'; it has {file.schema_arrow.names}")
                column = plain(file.read([on], use_threads=False)).column(on)
            texts = column.cast(pa.string()).drop_null().to_pylist()
        else:
            texts = [line.strip() for line in data.decode("utf-8").splitlines() if line.strip()]
        return _uids(texts) if on == "uid" else fingerprints(texts, on)
    except (pa.ArrowException, ValueError, OSError) as error:
        raise UserError(f"{where}: cannot be read: {error}") from None


def _uids(texts: Sequence[str]) -> Words:
    """Their words; what is not 32 hex digits is no uid, and names nobody."""
    return uid_words(bytes.fromhex("".join(text for text in texts if UID.fullmatch(text))))


def fingerprints(values: Sequence[str | None], on: str) -> Words:
    """Two words that stand for each text, whatever its length. Null has some that no list holds.

    Digests are hex, so that their case means nothing; that of a url or a key does.

    Args:
        values: any texts.
        on: what they are, but for uids.
    """
    out = bytearray()
    for value in values:
        text = value.lower() if value and on == "sha256" else value
        out += hashlib.sha256(b"\0null" if text is None else text.encode("utf-8", "replace")).digest()[:16]
    return uid_words(bytes(out))


def _read(url: str, machine: Machine) -> bytes:
    folder, slash, name = url.rpartition("/")
    try:
        return Root(folder or slash or ".", machine.storage_options).read(name)
    except OSError as error:
        raise UserError(f"list: {redacted(url)} cannot be read: {error.strerror or type(error).__name__}") from None
