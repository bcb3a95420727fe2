"""Another ask never gets old results, and the same ask always does: parameters, weights, numerics, versions, shards."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.curate import curate
from pipeline.embed import Embed
from pipeline.executor import Serial
from pipeline.machine import Machine
from pipeline.recipe import recipe_of
from pipeline.run import Run, stage_key
from pipeline.storage import Root
from tests.pools import datacomp_pool
from tests.runs import datacomp
from tests.toy_stages import Times
from tests.trees import tree

pytestmark = pytest.mark.goal("R18")

EMBED = Embed("clip", "ViT-B-32", "laion2b", "a" * 64, False, "webdataset", "cpu avx512", "float32", False, ())


def changed(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    return value + "x" if isinstance(value, str) else (*value, "rule")


def test_whatever_shapes_a_vector_is_in_its_key_and_the_place_of_the_weights_is_not(
    record_property: pytest.RecordProperty,
) -> None:
    identity = [field.name for field in fields(EMBED) if field.name != "file"]
    keys = {stage_key(replace(EMBED, **{name: changed(getattr(EMBED, name))})) for name in identity}
    assert len(keys | {stage_key(EMBED)}) == len(identity) + 1
    here, there = replace(EMBED, file="/here"), replace(EMBED, file="/there")
    assert stage_key(here) == stage_key(there)
    same, newer = (type("Times", (Times,), {"version": version}) for version in (Times.version, Times.version + 1))
    assert stage_key(same(2)) == stage_key(Times(2)) != stage_key(newer(2)), "a stage whose code has changed"
    record_property("figure", f"{len(identity)} properties of an embedding, a stage's version: each its own key")


CHANGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "filter": lambda recipe: recipe["select"][0]["filter"].update(min_words=4),
    "epsilon": lambda recipe: recipe["select"][1]["dedup"].update(epsilon=0.01),
    "rule": lambda recipe: recipe["select"][1]["dedup"].update(rule="greedy"),
    "cut": lambda recipe: recipe["select"][2]["cut"].update(keep=0.7),
    "clusters": lambda recipe: recipe["select"][3]["density"].update(clusters=3),
    "temperature": lambda recipe: recipe["select"][3]["density"].update(temperature=0.5),
    "draw": lambda recipe: recipe["select"][4]["random"].update(keep=0.8),
    "order": lambda recipe: recipe["select"].reverse(),
    "model": lambda recipe: recipe["models"]["l14"].update(image="b32_img", text="b32_txt"),
    "seed": lambda recipe: recipe.update(seed=1),
}


@pytest.mark.slow
@pytest.mark.parametrize("changes", [3, pytest.param(len(CHANGES), marks=pytest.mark.campaign)])
def test_a_run_in_a_store_of_other_recipes_writes_what_it_writes_in_an_empty_one(
    tmp_path: Path, changes: int, record_property: pytest.RecordProperty
) -> None:
    recipe = datacomp(datacomp_pool(tmp_path / "pool", 3, 40, 1))

    def made(store: str, asked: dict[str, Any]) -> tuple[dict[str, bytes], Run]:
        run = Run(Root(str(tmp_path / store)), Root(str(tmp_path / "run")), Serial(), Machine())
        curate(run, recipe_of(asked), group_units=2)
        return tree(tmp_path / "run"), run

    before, _ = made("shared", recipe)
    for name, change in list(CHANGES.items())[:changes]:
        asked = copy.deepcopy(recipe)
        change(asked)
        found, _ = made("shared", asked)
        assert found == made(name, asked)[0], name
        assert found != before, f"{name} changes nothing here, so this shows nothing"
    again, run = made("shared", recipe)
    assert again == before
    exports = {"decide", "show_problems", "show_assignment", "write_parquet", "write_subset"}
    assert {entry["stage"] for entry in run.times} <= exports, "only files of the directory are made again"
    record_property("figure", f"{changes} changes of a recipe in one store and directory: as in empty ones")
