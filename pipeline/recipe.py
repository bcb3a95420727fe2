"""What to compute: a YAML recipe in, a typed, frozen Recipe out; every field of it is identity.

Unknown keys are refused with the nearest known one, and every mistake is one message that names its key.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pyarrow as pa
from pydantic import Field, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from pipeline.config import dump_yaml, first_fault, load_yaml, nearest, parse_yaml, validate
from pipeline.errors import UserError
from pipeline.pool import Pool
from pipeline.schema import DECISION
from pipeline.select.cut import Cut
from pipeline.select.dedup import Dedup
from pipeline.select.density import Density
from pipeline.select.filter import Filter
from pipeline.select.list import List
from pipeline.select.random import Random
from pipeline.step import RULE
from pipeline.storage import redacted

RULES = {
    "list": List,
    "filter": Filter,
    "dedup": Dedup,
    "cut": Cut,
    "density": Density,
    "random": Random,
}
"""A selection rule by its name in a recipe. A new one is a file in select/, its import and its line here."""

Rule = List | Filter | Dedup | Cut | Density | Random


@dataclass(frozen=True, config=RULE)
class Network:
    """A CLIP model that open_clip can load.

    Attributes:
        weights: `tiny`, a pretrained tag of `arch`, a local .safetensors or .pt file, or hf-hub:ORG/NAME.
        arch: open_clip's name of the architecture; not needed for `tiny` and hf-hub:.
        sha256: digest of the weights file; filled in when the run starts, and checked where the recipe gives it.
    """

    weights: str
    arch: str | None = None
    sha256: str | None = None

    @property
    def sides(self) -> tuple[str, ...]:
        return ("image", "text")


@dataclass(frozen=True, config=RULE)
class Arrays:
    """Vectors that the pool brings along.

    Attributes:
        image: name of the array of image vectors.
        text: name of the array of text vectors; without it the model has no score.
    """

    image: str
    text: str | None = None

    @property
    def sides(self) -> tuple[str, ...]:
        return ("image", "text") if self.text else ("image",)


Model = Network | Arrays


@dataclass(frozen=True, config=RULE)
class Write:
    """What is written of the kept samples.

    Attributes:
        formats: webdataset (tars, byte for byte), parquet (caption, metadata, scores), subset (DataComp's uid list).
            None: what the pool allows.
        samples_per_shard: of the tars.
        annotate: add a `pairsieve` object to each .json member; otherwise members are untouched.
        images: put image bytes into the parquet files.
    """

    formats: list[Literal["webdataset", "parquet", "subset"]] | None = None
    samples_per_shard: Annotated[int, Field(ge=1)] = 10_000
    annotate: bool = False
    images: bool = False


@dataclass(frozen=True, config=RULE)
class Limits:
    """How much damage is too much.

    Attributes:
        max_unreadable: samples with a problem, or damaged shards, as a fraction of the listed ones; above it a finished
            run ends with exit 3.
    """

    max_unreadable: Annotated[float | int, Field(ge=0, le=1)] = 0.01


@dataclass(frozen=True, config=RULE)
class Recipe:
    """Everything that decides which bytes a run writes.

    Attributes:
        pool: the samples.
        models: name -> where its vectors come from.
        select: (name of the rule, rule), in order; each sees the survivors of the one before.
        write: what is written.
        limits: how much damage is too much.
        seed: of every hash and of k-means.
        embed_all: embed also what leading filters drop.
    """

    pool: Pool
    models: dict[str, Model] = dataclasses.field(default_factory=dict)
    select: list[tuple[str, Rule]] = dataclasses.field(default_factory=list)
    write: Write = dataclasses.field(default_factory=Write)
    limits: Limits = dataclasses.field(default_factory=Limits)
    seed: int = 0
    embed_all: bool = False

    @model_validator(mode="after")
    def _names(self) -> Recipe:
        for at, (name, rule) in enumerate(self.select):
            where = f"select.{at}.{name}"
            if isinstance(rule, (Dedup, Density)):
                owner, _, side = rule.space.partition(".")
                if owner not in self.models:
                    raise UserError(f"recipe.{where}.space: no model '{owner}'{nearest(owner, list(self.models))}")
                if side not in ("", "text") or (side or "image") not in self.models[owner].sides:
                    raise UserError(f"recipe.{where}.space: model '{owner}' has no '{side}' vectors")
            if isinstance(rule, Cut) and rule.column == "":
                raise UserError(f"recipe.{where}.score: which column? (`column:NAME`)")
            if isinstance(rule, Cut) and rule.column in self._own_columns:
                raise UserError(
                    f"recipe.{where}.score: the decisions have a column '{rule.column}' of their own, and cannot show "
                    "the pool's beside it; name that otherwise"
                )
            if isinstance(rule, Cut) and rule.column is None:
                if rule.score not in self.models:
                    known = nearest(rule.score, list(self.models))
                    raise UserError(f"recipe.{where}.score: no model '{rule.score}'{known} (a column is `column:NAME`)")
                if "text" not in self.models[rule.score].sides:
                    raise UserError(f"recipe.{where}.score: model '{rule.score}' has no text vectors, so no score")
        for name, model in self.models.items():
            if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
                raise UserError(f"recipe.models.{name}: a model's name is letters, digits, _ and -")
            if isinstance(model, Arrays) and self.pool.format not in ("datacomp", "clip_retrieval"):
                raise UserError(f"recipe.models.{name}: a {self.pool.format} pool has no precomputed arrays")
            if isinstance(model, Network) and self.pool.format == "clip_retrieval":
                raise UserError(f"recipe.models.{name}: a clip_retrieval pool has no images to embed; name its arrays")
        return self

    @property
    def scored(self) -> tuple[str, ...]:
        """Models with both vectors, and so a score."""
        return tuple(name for name, model in self.models.items() if "text" in model.sides)

    @property
    def _own_columns(self) -> tuple[str, ...]:
        return (*DECISION, *(f"score_{name}" for name in self.scored))

    @property
    def used_columns(self) -> dict[str, pa.DataType]:
        """The pool's columns that a step uses, as the decisions hold them: float64 where any step compares numbers.

        One that is named as the decisions' own is not among them: those stand.
        """
        used: dict[str, pa.DataType] = {}
        for _, rule in self.select:
            for name, kind in rule.uses_columns().items():
                used[name] = pa.float64() if pa.float64() in (kind, used.get(name)) else kind
        return {name: kind for name, kind in used.items() if name not in self._own_columns}


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file and apply `KEY=VALUE` overrides; a dotted key reaches into lists by index.

    Raises:
        UserError: the file, a key or a value is wrong; the message names it.
    """
    plain = load_yaml(path)
    if not isinstance(plain, dict):
        raise UserError(f"{path}: a recipe is a mapping with `pool`, `select`, ...")
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise UserError(f"--set {override}: expected KEY=VALUE")
        set_key(plain, key.split("."), parse_yaml(value, f"--set {key}"), key)
    return recipe_of(plain)


def set_key(plain: Any, path: list[str], value: Any, whole: str) -> None:
    """Put a value into nested mappings and lists, in place; a missing mapping is made.

    Raises:
        UserError: the path leads through something that is neither, or beyond the end of a list.
    """
    first, rest = path[0], path[1:]
    key: Any = first
    if isinstance(plain, list):
        if not first.isdecimal() or int(first) >= len(plain):
            raise UserError(f"--set {whole}: '{first}' is not an index of a list of {len(plain)}")
        key = int(first)
    elif not isinstance(plain, dict):
        raise UserError(f"--set {whole}: '{first}' is not inside a mapping or list")
    if not rest:
        plain[key] = value
        return
    if isinstance(plain, dict) and plain.get(key) is None:
        plain[key] = {}
    set_key(plain[key], rest, value, whole)


def recipe_of(plain: dict[str, Any]) -> Recipe:
    """A typed recipe of plain YAML data.

    Raises:
        UserError: the first mistake, with the dotted path of its key.
    """
    known = [f.name for f in dataclasses.fields(Recipe)]
    unknown = [str(key) for key in plain if key not in known]
    if unknown:
        raise UserError(f"recipe.{unknown[0]}: unknown key{nearest(unknown[0], known)}")
    if "pool" not in plain:
        raise UserError("recipe.pool: required, but missing")
    typed = dict(plain)
    for name, kind in (("pool", Pool), ("write", Write), ("limits", Limits)):
        if name in typed:
            typed[name] = validate(kind, typed[name], f"recipe.{name}")
    typed["models"] = {str(k): _model(v, f"recipe.models.{k}") for k, v in _mapping(plain, "models").items()}
    typed["select"] = _rules(plain.get("select"))
    try:
        return Recipe(**typed)
    except ValidationError as error:
        raise UserError(first_fault(error, "recipe")) from None


def _mapping(plain: dict[str, Any], name: str) -> dict[Any, Any]:
    value = plain.get(name) or {}
    if not isinstance(value, dict):
        raise UserError(f"recipe.{name}: expected keys and values, got {type(value).__name__}")
    return value


def _model(value: Any, where: str) -> Model:
    if isinstance(value, dict) and "image" in value:
        return validate(Arrays, value, where)
    if isinstance(value, dict) and "weights" not in value and "arch" in value:
        raise UserError(f"{where}: a model needs `weights`: tiny, a pretrained tag, a file or hf-hub:ORG/NAME")
    return validate(Network, value, where)


def _rules(value: Any) -> list[tuple[str, Rule]]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise UserError(f"recipe.select: expected a list of steps, got {type(value).__name__}")
    rules: list[tuple[str, Rule]] = []
    for at, item in enumerate(value):
        if not isinstance(item, dict) or len(item) != 1:
            raise UserError(
                f"recipe.select.{at}: a step is one rule and its keys, such as `- cut: {{score: clip, keep: 0.3}}`"
            )
        ((name, keys),) = item.items()
        if name not in RULES:
            raise UserError(f"recipe.select.{at}.{name}: no such rule{nearest(str(name), list(RULES))}")
        rules.append((name, validate(RULES[name], keys, f"recipe.select.{at}.{name}")))
    return rules


def resolved(recipe: Recipe) -> str:
    """The recipe as YAML with every default written out; `load_recipe` of it gives the same recipe.

    It is published with the data: user info and queries of URLs are left out.
    """
    plain = TypeAdapter(Recipe).dump_python(recipe, exclude_none=True)
    path = recipe.pool.path
    plain["pool"]["path"] = redacted(path) if isinstance(path, str) else [redacted(item) for item in path]
    rules = zip(plain["select"], recipe.select, strict=True)
    plain["select"] = [{name: keys | _places(rule)} for (name, keys), (_, rule) in rules]
    return dump_yaml(plain)


def _places(rule: Rule) -> dict[str, str]:
    """The fields of a rule that say where something lies, as they are shown."""
    names = [field.name for field in dataclasses.fields(rule) if field.metadata.get("place")]
    return {name: redacted(getattr(rule, name)) for name in names if getattr(rule, name) is not None}
