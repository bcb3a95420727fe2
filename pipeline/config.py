"""From YAML to typed values, with errors that name the key: shared by recipes and machine files."""

from __future__ import annotations

import difflib
import json
import re
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from pipeline.errors import UserError

MAX_YAML_BYTES = 256 * 1024
"""A recipe is a page of text; more is a mistake or an attack."""

T = TypeVar("T")


class _NoAlias(yaml.SafeLoader):
    """A safe loader without anchors: their expansion grows without bound (reliability.md S9).

    Only true and false are booleans, as in YAML 1.2: `on` is a key of the list rule, `no` the code of a language. And
    1e-3 is a number, as it is there.
    """

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            raise yaml.YAMLError("anchors and aliases (& and *) are not allowed")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        mapping = super().construct_mapping(node, deep)
        if len(mapping) < len(node.value):
            keys = [self.construct_object(key) for key, _ in node.value]
            raise yaml.YAMLError(f"the key '{next(key for key in keys if keys.count(key) > 1)}' is given twice")
        return mapping


_NoAlias.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile("^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)


_EXPONENT = (
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\.\d+|\d+(?:\.\d*)?)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)
_NoAlias.add_implicit_resolver(*_EXPONENT)


class _Dumper(yaml.SafeDumper):
    """Quotes text that the loader would take for a number."""


_Dumper.add_implicit_resolver(*_EXPONENT)


def dump_yaml(value: Any) -> str:
    """Plain data as YAML, keys in their order; `parse_yaml` of it gives the same data."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def parse_yaml(text: str, where: str) -> Any:
    """Parse one small YAML document.

    Raises:
        UserError: it is too large, uses aliases or tags, or is not YAML; `where` names it in the message.
    """
    if len(text.encode()) > MAX_YAML_BYTES:
        raise UserError(f"{where}: larger than {MAX_YAML_BYTES} bytes")
    try:
        return _NoAlias(text).get_single_data()
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        first = " ".join(str(error).split())
        raise UserError(f"{where}: not valid YAML: {first[:300]}") from None


def load_yaml(path: Path) -> Any:
    """Read one YAML file.

    Raises:
        UserError: the file cannot be read, or `parse_yaml` refuses it.
    """
    try:
        if path.stat().st_size > MAX_YAML_BYTES:
            raise UserError(f"{path}: larger than {MAX_YAML_BYTES} bytes")
        return parse_yaml(path.read_text("utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


def nearest(name: str, known: list[str]) -> str:
    """`; did you mean 'x'?` for a misspelled name, or the list of what is known."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else f"; known: {', '.join(sorted(known))}" if known else ""


def field_names(kind: Any) -> list[str]:
    """The keys that a pydantic model or dataclass takes."""
    fields = getattr(kind, "model_fields", None) or getattr(kind, "__pydantic_fields__", None) or {}
    return list(fields)


def validate(kind: type[T], value: Any, where: str) -> T:
    """Make a typed value of plain YAML data.

    Args:
        kind: a pydantic model or pydantic dataclass that forbids unknown keys.
        value: what the YAML holds at `where`; None counts as empty.
        where: the dotted path of the value, for messages.

    Raises:
        UserError: the first fault, with the dotted path of its key and the nearest known key.
    """
    if value is None:
        value = {}
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected keys and values, got {type(value).__name__}")
    unknown = [str(k) for k in value if k not in field_names(kind)]
    if unknown:
        raise UserError(f"{where}.{unknown[0]}: unknown key{nearest(unknown[0], field_names(kind))}")
    try:
        # By way of JSON: there, strict types still make dataclasses of mappings.
        return TypeAdapter(kind).validate_json(json.dumps(value, default=str))
    except ValidationError as error:
        raise UserError(first_fault(error, where)) from None


def first_fault(error: ValidationError, where: str) -> str:
    """The first fault that pydantic found, as one line with the dotted path of its key."""
    faults = error.errors(include_url=False)
    # Of what may be a whole number or a fraction, the message for a fraction asks for "a number".
    fault = next((f for f in faults if f["loc"] == (*faults[0]["loc"][:-1], "float")), faults[0])
    # Members of a union are no keys.
    keys = [str(p) for p in fault["loc"] if p not in ("int", "float", "str", "bool", "constrained-int")]
    path = ".".join([where, *keys])
    if fault["type"] in ("missing", "missing_argument"):
        return f"{path}: required, but missing"
    if fault["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"{path}: unknown key"
    message = fault["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    is_shown = not isinstance(fault["input"], (dict, list)) and "storage_options" not in keys  # it may hold a secret
    return f"{path}: {message}" + (f", got {fault['input']!r}" if is_shown else "")
