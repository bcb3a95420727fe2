"""Small stages for the tests of the commit protocol."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import pyarrow as pa

from pipeline.errors import UserError
from pipeline.machine import Machine
from pipeline.stage import Files, Function, Made, Rows


@dataclass(frozen=True)
class Lines:
    """The numbers in a text file, one a line."""

    name: ClassVar[str] = "lines"
    version: ClassVar[int] = 1
    outputs: ClassVar[tuple[str, ...]] = ("numbers",)
    exact: ClassVar[bool] = True

    def build(self, machine: Machine) -> Function:
        return self.read

    def read(self, files: Files) -> Made:
        numbers = [int(line) for line in Path(files.open("text").path).read_text().split()]
        return Made({"numbers": pa.table({"number": pa.array(numbers, pa.int64())})}, {"count": len(numbers)})


@dataclass(frozen=True)
class Times:
    """Every number times a factor; fails where the machine's scratch folder says so: `down-N` or `wrong-N`."""

    factor: int
    place: str = field(default="", metadata={"place": True})

    name: ClassVar[str] = "times"
    version: ClassVar[int] = 1
    outputs: ClassVar[tuple[str, ...]] = ("products",)
    exact: ClassVar[bool] = True

    def build(self, machine: Machine) -> Function:
        scratch = Path(machine.scratch or "/nowhere")

        def run(numbers: Rows) -> Made:
            values = numbers.table().column("number").to_pylist()
            if (scratch / f"down-{values[0]}").exists():
                raise OSError("the disk is full")
            if (scratch / f"wrong-{values[0]}").exists():
                raise UserError("recipe.factor: this number cannot be multiplied")
            return Made({"products": pa.table({"product": [value * self.factor for value in values]})})

        return run


@dataclass(frozen=True)
class Guess(Times):
    """The same, but not exact."""

    name: ClassVar[str] = "guess"
    exact: ClassVar[bool] = False


@dataclass(frozen=True)
class Slow(Times):
    """The same, and tells where its time went, as embedding does."""

    name: ClassVar[str] = "slow"

    def build(self, machine: Machine) -> Function:
        times = super().build(machine)
        return lambda numbers: replace(times(numbers), seconds={"read": 1.0, "decode": 9.0, "image": 4.0, "text": 1.0})


@dataclass(frozen=True)
class Scatter:
    """Every number to the bucket of its remainder."""

    buckets: int

    name: ClassVar[str] = "scatter"
    version: ClassVar[int] = 1
    outputs: ClassVar[tuple[str, ...]] = ("rows",)
    exact: ClassVar[bool] = True

    def build(self, machine: Machine) -> Function:
        return self.scatter

    def scatter(self, numbers: Rows) -> Made:
        number = numbers.table().column("number")
        to = pa.array([value % self.buckets for value in number.to_pylist()], pa.int32())
        return Made({"rows": pa.table({"to": to, "number": number})}, buckets=self.buckets)


@dataclass(frozen=True)
class Sum:
    """The sum of all numbers that one task reads."""

    name: ClassVar[str] = "sum"
    version: ClassVar[int] = 1
    outputs: ClassVar[tuple[str, ...]] = ("sums",)
    exact: ClassVar[bool] = True

    def build(self, machine: Machine) -> Function:
        return self.sum

    def sum(self, numbers: Rows) -> Made:
        table = numbers.table()
        values = table.column("number").to_pylist() if table.num_columns else []
        return Made({"sums": pa.table({"sum": [sum(values)]})})


@dataclass(frozen=True)
class Print:
    """The numbers as a file of the run directory, named after the first."""

    name: ClassVar[str] = "print"
    version: ClassVar[int] = 1
    outputs: ClassVar[tuple[str, ...]] = ()
    exact: ClassVar[bool] = True

    def build(self, machine: Machine) -> Function:
        return self.print

    def print(self, numbers: Rows) -> Made:
        values = numbers.table().column("number").to_pylist()
        text = "".join(f"{value}\n" for value in values)
        return Made({}, exports={f"printed/{values[0]}.txt": lambda out: out.write(text.encode())})


@dataclass(frozen=True)
class Liar(Sum):
    """Makes another table than it declares."""

    name: ClassVar[str] = "liar"

    def sum(self, numbers: Rows) -> Made:
        return Made({"other": pa.table({"sum": [0]})})
