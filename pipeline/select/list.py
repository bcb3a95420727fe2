"""list: keep only what a list names, or drop what it names.

A list is a parquet file with the column `on`, a text file with a value a line, or a DataComp subset (.npy of u8,u8
uids). It is known by its content, never by where it lies.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from dataclasses import field, replace
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import model_validator
from pydantic.dataclasses import dataclass

from pipeline.arrow import hexes
from pipeline.errors import UserError
from pipeline.formats.metadata import open_parquet, plain
from pipeline.machine import Machine
from pipeline.select.judge import judged
from pipeline.state import Verdict
from pipeline.step import RULE, Outcome, Step
from pipeline.storage import Root, redacted

SUBSET = np.dtype("u8,u8")


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

    def uses_columns(self) -> dict[str, pa.DataType]:
        return {}

    def apply(self, step: Step) -> Outcome:
        return Outcome(judged(step, self))

    def build(self, machine: Machine) -> Callable[[pa.Table, pa.Table], Verdict]:
        listed = members(_read(self.url, machine), self.url, self.on)
        denying = self.deny is not None

        def judge(samples: pa.Table, columns: pa.Table) -> Verdict:
            there = np.isin(fingerprints(_values(samples, self.on), self.on), listed)
            drop = pa.array(there if denying else ~there)
            reason = pc.if_else(drop, "denied" if denying else "not_allowed", pa.scalar(None, pa.string()))
            nothing = pa.nulls(samples.num_rows, pa.float64())
            return Verdict(reason, nothing, nothing)

        return judge


def members(data: bytes, url: str, on: str) -> np.ndarray:
    """Sorted fingerprints of what a list names.

    Args:
        data: the file.
        url: its name; the ending tells its kind.
        on: the column of a parquet file.

    Returns:
        S16 (M,).

    Raises:
        UserError: the file is not what its name says, or lacks the column.
    """
    where = f"list: {redacted(url)}"
    try:
        if url.endswith(".npy"):
            pairs = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
            if pairs.dtype != SUBSET or on != "uid":
                raise UserError(f"{where}: a .npy list holds u8,u8 uids (found {pairs.dtype}) and needs `on: uid`")
            return np.sort(fingerprints([f"{a:016x}{b:016x}" for a, b in pairs.tolist()], on))
        if url.endswith(".parquet"):
            with open_parquet(data) as file:
                if on not in file.schema_arrow.names:
                    raise UserError(f"{where}: no column '{on}'; it has {file.schema_arrow.names}")
                column = plain(file.read([on], use_threads=False)).column(on)
            return np.sort(fingerprints(column.cast(pa.string()).drop_null().to_pylist(), on))
        return np.sort(fingerprints([line.strip() for line in data.decode("utf-8").splitlines() if line.strip()], on))
    except (pa.ArrowException, ValueError, OSError) as error:
        raise UserError(f"{where}: cannot be read: {error}") from None


def fingerprints(values: list[str | None], on: str) -> np.ndarray:
    """16 bytes that stand for each text, whatever its length; S16 (N,). Null has one that no list holds.

    Digests are hex, so that their case means nothing; that of a url or a key does. The last byte of a fingerprint is
    odd, because numpy strips zero bytes from the end of S16.
    """
    out = bytearray()
    any_case = on in ("uid", "sha256")
    for value in values:
        text = value.lower() if value and any_case else value
        digest = hashlib.sha256(b"\0null" if text is None else text.encode("utf-8", "replace")).digest()
        out += digest[:15] + bytes([digest[15] | 1])
    return np.frombuffer(bytes(out), "S16")


def _values(samples: pa.Table, on: str) -> list[str | None]:
    return hexes(samples.column("uid")) if on == "uid" else samples.column(on).to_pylist()


def _read(url: str, machine: Machine) -> bytes:
    folder, slash, name = url.rpartition("/")
    try:
        return Root(folder or slash or ".", machine.storage_options).read(name)
    except OSError as error:
        raise UserError(f"list: {redacted(url)} cannot be read: {type(error).__name__}") from None
