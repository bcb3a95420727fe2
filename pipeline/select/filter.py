"""filter: captions, picture sizes, languages and metadata columns within bounds.

Source: DataComp's basic filter (arXiv:2304.14108, appendix; methods.md 5.3), with each bound on its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from pipeline.errors import UserError
from pipeline.machine import Machine
from pipeline.select.judge import judged
from pipeline.state import Verdict
from pipeline.step import RULE, Outcome, Step, as_text, table_numbers, table_texts


@dataclass(frozen=True, config=RULE)
class Column:
    """Bounds of one metadata column; all that are given must hold.

    Attributes:
        min, max: compared in float64.
        equals: compared as text, so that true, 3 and "en" all work.
        not_in: texts that drop the row.
    """

    min: float | int | None = None
    max: float | int | None = None
    equals: str | int | float | bool | None = None
    not_in: list[str | int | float | bool] | None = None

    @model_validator(mode="after")
    def _bounds(self) -> Column:
        if self.min is None and self.max is None and self.equals is None and self.not_in is None:
            raise ValueError("give at least one of min, max, equals, not_in")
        return self


@dataclass(frozen=True, config=RULE)
class Language:
    """Which languages are kept, and what says a sample's: a column of the pool, or a detector.

    Attributes:
        keep: codes as the column spells them, or as the detector does (en, de, zh, ...).
        column: the column.
        detector: cld3 reads the caption, as LAION and DataComp's laion2b baseline did (up to 1,000 bytes).
    """

    keep: list[str]
    column: str | None = None
    detector: Literal["cld3"] | None = None

    @model_validator(mode="after")
    def _one(self) -> Language:
        if (self.column is None) == (self.detector is None):
            raise ValueError("language needs one of column and detector")
        return self


@dataclass(frozen=True, config=RULE)
class Filter:
    """Drop rows outside the bounds; the reason is the first key that fails, in the order below.

    A row without the value is dropped as `missing_<key>`; for `columns` the key is the column's name.

    Attributes:
        min_words: of the caption, by str.split.
        min_chars: code points of the caption.
        min_side_px: of the shorter side.
        max_aspect: longer over shorter side.
        language: languages kept.
        columns: metadata column -> bounds.
    """

    min_words: Annotated[int, Field(ge=0)] | None = None
    min_chars: Annotated[int, Field(ge=0)] | None = None
    min_side_px: Annotated[int, Field(ge=0)] | None = None
    max_aspect: Annotated[float | int, Field(ge=1)] | None = None
    language: Language | None = None
    columns: dict[str, Column] | None = None

    @model_validator(mode="after")
    def _any(self) -> Filter:
        if not any(
            [v is not None for v in (self.min_words, self.min_chars, self.min_side_px, self.max_aspect)]
            + [bool(self.language), bool(self.columns)]
        ):
            raise ValueError("filter needs at least one bound")
        return self

    @property
    def reads(self) -> Sequence[str]:
        return ("caption", "width", "height", "original_width", "original_height")

    def uses_columns(self) -> dict[str, pa.DataType]:
        """Metadata columns that the step reads, and their type in the decisions."""
        named = {
            name: pa.float64() if c.equals is None and c.not_in is None else pa.string()
            for name, c in (self.columns or {}).items()
        }
        own = self.language.column if self.language else None
        return named | ({own: pa.string()} if own else {})

    def apply(self, step: Step) -> Outcome:
        return judged(step, self)

    def build(self, machine: Machine) -> Callable[[pa.Table, pa.Table], Verdict]:
        detect = cld3() if self.language and self.language.detector else None

        def judge(samples: pa.Table, columns: pa.Table) -> Verdict:
            return self.judge(samples, columns, detect)

        return judge

    def judge(self, samples: pa.Table, columns: pa.Table, detect: Callable[[str], str] | None = None) -> Verdict:
        """The verdict on each row of one unit.

        Args:
            samples: schema.SAMPLES.
            columns: the unit's metadata, aligned.
            detect: language of a caption, where the rule names a detector.
        """
        return _verdict(self.checks(samples, columns, detect), samples.num_rows)

    def checks(self, samples: pa.Table, columns: pa.Table, detect: Callable[[str], str] | None = None) -> list[Check]:
        """Every condition on the rows of one unit, in the order in which they are tried."""
        checks = [*self._captions(samples), *self._sides(samples)]
        if self.language:
            if detect:
                text = [None if c is None else detect(c) for c in samples.column("caption").to_pylist()]
            else:
                text = table_texts(columns, self.language.column or "")
            fails = np.array([t not in self.language.keep for t in text], bool)
            checks.append(Check("language", np.array([t is None for t in text], bool), fails, None, None))
        for name, bounds in (self.columns or {}).items():
            checks += _column(columns, name, bounds)
        return checks

    def _captions(self, samples: pa.Table) -> list[Check]:
        if self.min_words is None and self.min_chars is None:
            return []
        captions = samples.column("caption").to_pylist()
        missing = np.array([c is None for c in captions], bool)
        words = np.array([len(c.split()) if c else 0 for c in captions], np.float64)
        chars = np.array([len(c) if c else 0 for c in captions], np.float64)
        bounds = (("min_words", words, self.min_words), ("min_chars", chars, self.min_chars))
        return [Check(key, missing, have < least, have, least) for key, have, least in bounds if least is not None]

    def _sides(self, samples: pa.Table) -> list[Check]:
        if self.min_side_px is None and self.max_aspect is None:
            return []
        width, height = (_pixels(samples, side) for side in ("width", "height"))
        missing = np.isnan(width) | np.isnan(height)
        short, long = np.fmin(width, height), np.fmax(width, height)
        checks = []
        if self.min_side_px is not None:
            checks.append(Check("min_side_px", missing, short < self.min_side_px, short, self.min_side_px))
        if self.max_aspect is not None:
            # As a product, so that 600 x 200 is exactly 3.0 and not a rounding above it.
            aspect = np.divide(long, short, out=np.full(len(short), np.inf), where=short > 0)
            checks.append(Check("max_aspect", missing, long > self.max_aspect * short, aspect, self.max_aspect))
        return checks


def cld3() -> Callable[[str], str]:
    """The language that CLD3 finds most likely in a text, as a code such as `en`; `und` where it finds none.

    Raises:
        UserError: the package is not installed.
    """
    try:
        import gcld3
    except ImportError:
        raise UserError("filter.language.detector: needs the extra: pip install 'pairsieve[language]'") from None
    identifier = gcld3.NNetLanguageIdentifier(min_num_bytes=0, max_num_bytes=1000)
    return lambda text: str(identifier.FindLanguage(text=text).language)


class Check:
    """One condition on N rows: which lack the value, which fail it, what was measured against what."""

    def __init__(
        self, key: str, missing: np.ndarray, fails: np.ndarray, value: np.ndarray | None, threshold: Any
    ) -> None:
        self.key = key
        self.missing = missing
        self.fails = fails
        self.value = value
        self.threshold = threshold


def _pixels(samples: pa.Table, side: str) -> np.ndarray:
    """One side in px, NaN if unknown: of the original where the pool gives both of its sides, else as stored."""
    original = [samples.column(f"original_{s}").to_pylist() for s in ("width", "height")]
    both = np.array([w is not None and h is not None for w, h in zip(*original, strict=True)], bool)
    first, second = (
        np.array([np.nan if v is None else v for v in samples.column(name).to_pylist()], np.float64)
        for name in (f"original_{side}", side)
    )
    return np.where(both, first, second)


def _column(columns: pa.Table, name: str, bounds: Column) -> list[Check]:
    checks = []
    key = f"columns.{name}"
    if bounds.min is not None or bounds.max is not None:
        value = table_numbers(columns, name)
        missing = ~np.isfinite(value)
        if bounds.min is not None:
            checks.append(Check(key, missing, value < bounds.min, value, bounds.min))
        if bounds.max is not None:
            checks.append(Check(key, missing, value > bounds.max, value, bounds.max))
    if bounds.equals is not None or bounds.not_in is not None:
        text = table_texts(columns, name)
        missing = np.array([t is None for t in text], bool)
        if bounds.equals is not None:
            wanted = as_text(bounds.equals)
            checks.append(Check(key, missing, np.array([t != wanted for t in text], bool), None, None))
        if bounds.not_in is not None:
            refused = {as_text(v) for v in bounds.not_in}
            checks.append(Check(key, missing, np.array([t in refused for t in text], bool), None, None))
    return checks


def _verdict(checks: list[Check], rows: int) -> Verdict:
    reason = np.full(rows, None, object)
    open_N = np.ones(rows, bool)  # rows without a reason yet
    value, threshold = np.full(rows, np.nan), np.full(rows, np.nan)
    failing: dict[str, np.ndarray] = {}
    for check in checks:
        key = check.key.removeprefix("columns.")
        failing[check.key] = failing.get(check.key, np.zeros(rows, bool)) | check.fails | check.missing
        missing, fails = check.missing & open_N, check.fails & ~check.missing & open_N
        reason[missing] = f"missing_{key}"
        reason[fails] = check.key
        open_N &= ~(missing | fails)
        if check.value is not None:
            value[fails] = check.value[fails]
            threshold[fails] = check.threshold
    number = {"type": pa.float64(), "from_pandas": True}
    return Verdict(pa.array(reason, pa.string()), pa.array(value, **number), pa.array(threshold, **number), failing)
