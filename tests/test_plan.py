"""plan: the arithmetic by hand, what it finds of a pool, and the command as a user sees it."""

from __future__ import annotations

import io
import json
import re
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from jobs.cli import main
from jobs.plan import figure
from pipeline.costs import money, size
from pipeline.errors import UserError
from pipeline.machine import Machine, Prices, Rates
from pipeline.plan import (
    ENTERED,
    KEPT,
    LISTED,
    PASS_S,
    SHARD_S,
    TARRED_S,
    Capacity,
    Facts,
    Kernels,
    Line,
    Plan,
    Shape,
    Speeds,
    predict,
    rounds,
    sample_rows,
    shapes,
)
from pipeline.probe import probe
from pipeline.recipe import recipe_of
from pipeline.select.dedup import Dedup
from pipeline.select.density import Density
from tests.pools import datacomp_pool, parquet_pool, webdataset_pool
from tests.runs import LIMITS, datacomp, run_recipe

FACTS = Facts(
    rows=1000,
    shards=600,  # three groups, so that two workers have enough to do in every step
    pool_bytes=1_000_000,
    files=2,
    usable=0.9,
    listing_bytes=100,
    passing={1: 0.5},
    dims={"m": 10},
)
SPEEDS = Speeds(
    read_s=1e-3,
    embed_s={"read": 1.0, "image": 2.0, "text": 1.0, "write": 1.0},
    decode_s=0.012,  # 12 s for each of the pool's 1000 bytes to a row
    write_s=1e-2,
    kernels={
        1: Kernels(train=100.0, assign=1000.0, compare=500.0),
        2: Kernels(train=200.0, assign=2000.0, compare=float("inf")),
    },
)
GPUS = Capacity(workers=2, gpus=4, threads=3, decoders=2)
PRICES = Prices(
    currency="EUR", cpu_core_hour=0.5, gpu_hour=2, storage_gb_month=0.02, egress_gb=0.1, per_million_requests=5
)


def recipe(*select: dict[str, Any], **more: Any) -> Any:
    plain = {"pool": {"format": "webdataset", "path": "nowhere"}, "models": {"m": {"weights": "tiny"}}}
    return recipe_of({**plain, "select": list(select), **more})


def line(plan: Plan, name: str) -> Line:
    return next(line for line in plan.lines if line.name == name)


def test_reading_and_embedding_by_hand() -> None:
    few = {"samples_per_shard": 100}
    plan = predict(recipe({"filter": {"min_words": 2}}, write=few), FACTS, SPEEDS, GPUS)
    # 10^6 bytes at a millisecond each, by two workers of three cores.
    assert line(plan, "read") == Line("read", 1000 * 3 / 3600, 0.0, 500 / 3600)
    # 900 can be used, the filter ahead leaves 450. Two decoders take 6 s for 12, in the shadow of which 1 + 2 s of
    # reading and images; then 1 s of text and 1 s of writing: 8 s each, one hour in all.
    assert plan.embedded == plan.kept == 450
    assert line(plan, "embed") == Line("embed", core_hours=5.0, gpu_hours=1.0, hours=0.25)
    assert plan.bound == "bound by decoding; 8 more cores to decode would help"  # four instead of two, for each GPU
    assert line(plan, "decide").core_hours == pytest.approx(1000 * LISTED.seconds * 3 / 3600)
    # 450 rows of 1000 bytes are copied into 5 shards, at a hundredth of a second each byte.
    assert line(plan, "write").hours == pytest.approx((450 * (KEPT.seconds + TARRED_S) + 5 * SHARD_S + 4500) / 2 / 3600)
    assert plan.read_bytes == 1_450_000
    assert plan.stored["samples"] == 100_000
    assert plan.stored["vectors"] == 450 * 2 * 2 * 10
    assert plan.stored["kept samples"] == 450 * (KEPT.bytes + 1000)
    assert plan.unpredictable == ()


def test_without_gpus_the_workers_embed_and_decode_in_line() -> None:
    plan = predict(recipe(), FACTS, SPEEDS, Capacity(workers=2, gpus=0, threads=3, decoders=0))
    assert line(plan, "embed") == Line("embed", 900 * 17 * 3 / 3600, 0.0, 900 * 17 / 2 / 3600)


def test_work_is_shared_by_no_more_workers_than_it_has_parts() -> None:
    one = predict(recipe({"filter": {"min_words": 2}}), replace(FACTS, shards=1), SPEEDS, GPUS)
    many = predict(recipe({"filter": {"min_words": 2}}, write={"samples_per_shard": 225}), FACTS, SPEEDS, GPUS)
    for name, workers in (("read", 2), ("embed", 4), ("01-filter", 2), ("decide", 2), ("write", 2)):
        one_shard_more = 1e-5  # is written by the other
        assert line(one, name).hours == pytest.approx(workers * line(many, name).hours, rel=one_shard_more)
        assert line(one, name).core_hours == pytest.approx(line(many, name).core_hours, rel=one_shard_more)
        assert line(one, name).gpu_hours == line(many, name).gpu_hours
    # 256 units are a group, and the steps have a part for each.
    groups = predict(recipe(), replace(FACTS, shards=257), SPEEDS, replace(GPUS, workers=3))
    assert line(groups, "decide").hours == pytest.approx(1000 * LISTED.seconds / 2 / 3600)


def test_a_filter_that_is_not_ahead_spares_no_embedding() -> None:
    facts = Facts(**{**vars(FACTS), "passing": {2: 0.5}})
    steps = ({"random": {"keep": 0.5}}, {"filter": {"min_words": 2}})
    plan = predict(recipe(*steps), facts, SPEEDS, GPUS)
    assert (plan.embedded, plan.kept) == (900, 225)
    plan = predict(recipe({"filter": {"min_words": 2}}, embed_all=True), FACTS, SPEEDS, GPUS)
    assert (plan.embedded, plan.kept) == (900, 450)


@pytest.mark.parametrize(
    ("steps", "kept", "unpredictable"),
    [
        ([{"cut": {"score": "m", "keep": 0.5}}], 450, ()),
        ([{"cut": {"score": "m", "keep": 0.5, "of": "pool"}}], 500, ()),
        ([{"cut": {"score": "m", "keep": 70}}], 70, ()),
        ([{"cut": {"score": "m", "keep": 5000}}], 900, ()),
        ([{"cut": {"score": "m", "min": 0.3}}], 900, ("01-cut",)),
        ([{"random": {"keep": 0.1}}, {"density": {"space": "m", "clusters": 3, "keep": 0.5}}], 45, ()),
        ([{"list": {"deny": "x", "on": "uid"}}], 900, ("01-list",)),
        ([{"random": {"keep": 0.5}}, {"dedup": {"space": "m", "epsilon": 0.1}}], 450, ("02-dedup",)),
    ],
)  # fmt: skip
def test_what_is_kept_follows_from_the_keeps_and_is_said_where_it_does_not(
    steps: list[dict[str, Any]], kept: int, unpredictable: tuple[str, ...]
) -> None:
    plan = predict(recipe(*steps), FACTS, SPEEDS, GPUS)
    assert (plan.kept, plan.unpredictable) == (kept, unpredictable)


def test_clustering_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    dedup = {"dedup": {"space": "m", "epsilon": 0.1, "clusters": 9, "iterations": 2}}
    density = {"density": {"space": "m", "clusters": 30, "keep": 0.5, "iterations": 4, "passes": 3}}
    plan = predict(recipe(dedup, density), FACTS, SPEEDS, GPUS)
    # k-means of one worker: 900 rows x 9 clusters x 10 dimensions at 100 a second; one iteration over a half of the
    # rows and the last over all.
    # The others: 900 x 9 x 10 to assign; 900 rows of 100 in a cluster, half of them earlier: 900 x 50 x 10 to compare.
    own = line(plan, "01-dedup")
    assert own.serial_hours == pytest.approx(810 * 1.5 / 3600)
    shared_s = 81 + 900 + 900 * ENTERED[Dedup].seconds
    assert own.hours == pytest.approx((1215 + shared_s / 2) / 3600)
    assert own.core_hours == pytest.approx((1215 + shared_s) * 3 / 3600)
    assert own.serial_bytes == 10 * (2 * 900 + 40 * 9)
    # Three iterations over a half, one over all; three exact passes and the assignment after them.
    own = line(plan, "02-density")
    assert own.serial_hours == pytest.approx(900 * 30 * 10 * 2.5 / 200 / 3600)
    shared_s = 4 * 135 + 900 * (ENTERED[Density].seconds + 3 * PASS_S)
    assert own.hours - own.serial_hours == pytest.approx(shared_s / 2 / 3600)
    # All are trained on, where they lie; dedup keeps those that it compared. Of a larger pool, both keep a copy first.
    steps_bytes = 900 * (ENTERED[Dedup].bytes + 20) + 900 * ENTERED[Density].bytes
    assert plan.stored["steps and decisions"] == steps_bytes + 1000 * LISTED.bytes
    monkeypatch.setattr("pipeline.cluster.SAMPLE_ROWS", 999)
    copied = predict(recipe(dedup, density), FACTS, SPEEDS, GPUS)
    assert copied.stored["steps and decisions"] == steps_bytes + 900 * (20 + 20) + 1000 * LISTED.bytes


@pytest.mark.parametrize(
    ("rows", "k", "iterations", "found"),
    [
        (250_000, 250, 20, 4 + 16 / 4),  # a quarter is as many as each cluster needs
        (249_999, 250, 20, 4 + 16 / 2),
        (100, 250, 20, 20),  # too few to leave any out
        (250_000, 250, 1, 1),
        (250_000, 250, 6, 1 + 5 / 4),
        (250_000, 250, 8, 2 + 6 / 4),
    ],
)
def test_k_means_goes_through_its_sample_so_often(rows: int, k: int, iterations: int, found: float) -> None:
    assert rounds(rows, k, iterations) == found


def test_the_shapes_of_clustering_steps_follow_the_survivors() -> None:
    select = (
        {"dedup": {"space": "m", "epsilon": 0.1, "clusters": "auto"}},
        {"cut": {"score": "m", "keep": 0.5}},
        {"density": {"space": "m", "clusters": 100, "keep": 0.5}},
    )
    facts = FACTS.scaled(10**9, None)
    assert shapes(recipe(*select), facts) == {
        1: Shape(rows=900_000_000, clusters=65_536, dims=10, sample=1 << 22),
        3: Shape(rows=450_000_000, clusters=100, dims=10, sample=1_000_000),
    }
    assert shapes(recipe({"cut": {"score": "m", "keep": 0.5}}), facts) == {}
    assert shapes(recipe(*select), replace(FACTS, usable=0)) == {}


def test_k_means_trains_on_what_the_clustering_draws() -> None:
    rule = Density(space="m", clusters=500, keep=0.5)
    assert sample_rows(rule, 100) == 100
    assert sample_rows(rule, 10**10) == 1 << 22  # 500 x 10,000 are more
    assert sample_rows(Density(space="m", clusters=100, keep=0.5), 10**10) == 1_000_000
    assert sample_rows(Density(space="m", clusters=1, keep=0.5, sample_per_cluster=7), 10**10) == 1 << 12


def test_twice_the_pool_is_twice_the_work_but_dedups_cosines() -> None:
    every = recipe({"filter": {"min_words": 2}}, {"cut": {"score": "m", "keep": 0.5}})
    one = predict(every, FACTS, SPEEDS, GPUS)
    two = predict(every, FACTS.scaled(2000, None), SPEEDS, GPUS)
    assert two.core_hours == pytest.approx(2 * one.core_hours, rel=1e-5)  # both write one shard
    assert two.read_bytes == 2 * one.read_bytes
    larger = predict(every, FACTS.scaled(None, 3_000_000), SPEEDS, GPUS)
    assert larger.rows == one.rows
    assert line(larger, "read").hours == pytest.approx(3 * line(one, "read").hours)
    assert line(larger, "embed").hours == pytest.approx(0.25 * 20 / 8)  # 36 s to decode, by two
    assert FACTS.scaled(None, None) == FACTS


def test_arrays_of_the_pool_are_read_and_nothing_is_embedded() -> None:
    plain = {
        "pool": {"format": "datacomp", "path": "nowhere"},
        "models": {"m": {"image": "a"}},
        "select": [{"random": {"keep": 0.5}}],
    }
    plan = predict(recipe_of(plain), FACTS, SPEEDS, GPUS)
    assert plan.embedded == plan.gpu_hours == 0
    assert plan.bound == ""
    assert line(plan, "arrays").core_hours == pytest.approx(900 * 20 * 20e-9 * 3 / 3600)
    assert plan.read_bytes == FACTS.pool_bytes  # no tars, nothing is copied


def test_money_by_hand() -> None:
    cost = money(
        PRICES, core_hours=10, gpu_hours=3, stored_bytes=50 * 10**9, egress_bytes=7 * 10**9, requests=2 * 10**5
    )
    assert cost == {
        "cores": 5.0,
        "GPUs": 6.0,
        "storage, a month": 1.0,
        "egress": pytest.approx(0.7),
        "requests": 1.0,
    }


def test_a_pool_is_counted_and_a_few_shards_looked_at(tmp_path: Path) -> None:
    pool = webdataset_pool(tmp_path / "pool", 6, 21, 1)
    plain = {
        "pool": {"format": "webdataset", "path": str(pool)},
        "models": {"small": {"weights": "tiny"}},
        "select": [{"filter": {"min_words": 3}}, {"dedup": {"space": "small", "epsilon": 0.1}}],
    }
    machine = Machine(device="cpu", workers=7, threads=1, decoders=2)
    found = probe(recipe_of(plain), machine)
    facts = found.facts
    files = [path for path in pool.iterdir() if path.suffix in (".tar", ".parquet")]
    assert (facts.shards, facts.files) == (6, 2)
    assert facts.pool_bytes == sum(path.stat().st_size for path in files)
    assert facts.rows == 6 * 20  # one of 21 was not downloaded
    assert facts.usable == pytest.approx(19 / 20)  # one has no caption
    assert facts.passing == {1: 1.0}
    assert facts.dims == {"small": 256}
    assert set(found.speeds.embed_s) == {"read", "image", "text", "write"}
    assert min(found.speeds.embed_s.values()) > 0
    assert min(found.speeds.read_s, found.speeds.decode_s, found.speeds.write_s) > 0
    (kernels,) = found.speeds.kernels.values()
    assert all(0 < rate < float("inf") for rate in (kernels.train, kernels.assign, kernels.compare))
    assert found.capacity == Capacity(workers=7, gpus=0, threads=1, decoders=2)
    looked, measured = found.notes
    assert looked.startswith("4 of 6 shards were read here, on ")
    assert looked.endswith("and 76 of their images decoded")
    assert measured.startswith("forward passes were measured here: ")


@pytest.mark.parametrize(
    ("rows", "found"),
    [
        ([20, 20, 20, 20, 20, 20, 3], 6 * 20 + 3),  # all full shards have as many: the last is read, too
        ([20, 20], 40),
        ([7], 7),
        ([200, 210, 190, 220, 180, 200, 30], pytest.approx(1230, rel=0.05)),  # by the bytes of those that were not read
    ],
)
def test_rows_are_those_of_the_shards_that_are_read_and_of_others_like_them(
    tmp_path: Path, rows: list[int], found: Any
) -> None:
    for shard, many in enumerate(rows):
        own = parquet_pool(tmp_path / f"{shard}", 1, many, shard)
        (own / "train-00000-of-00001.parquet").rename(tmp_path / f"{shard}.parquet")
    plain = {"pool": {"format": "parquet", "path": f"{tmp_path}/*.parquet"}}
    assert probe(recipe_of(plain), Machine(workers=1)).facts.rows == found


def test_filters_are_judged_by_the_rows_that_enter_them(tmp_path: Path) -> None:
    pool = datacomp_pool(tmp_path / "pool", 2, 50, 1)
    bounds = {"clip_l14_similarity_score": {"min": 0.5}}
    plain = {
        "pool": {"format": "datacomp", "path": str(pool)},
        "models": {"l14": {"image": "l14_img", "text": "l14_txt"}},
        "select": [{"filter": {"columns": bounds}}, {"random": {"keep": 0.5}}, {"filter": {"columns": bounds}}],
    }
    found = probe(recipe_of(plain), Machine(workers=1))
    assert 0 < found.facts.passing[1] < 1
    assert found.facts.passing[3] == 1  # the same again drops nothing
    assert found.facts.dims == {"l14": 32}
    assert found.speeds.kernels == {}  # nothing clusters


def test_rates_of_a_gpu_that_is_not_here_are_taken_as_stated(tmp_path: Path) -> None:
    pool = webdataset_pool(tmp_path / "pool", 1, 5, 1)
    plain = {
        "pool": {"format": "webdataset", "path": str(pool)},
        "models": {
            "b": {"arch": "ViT-B-32-quickgelu", "weights": "openai"},
            "l": {"arch": "ViT-L-14", "weights": "openai"},
        },
    }
    rates = Rates(source="somebody", images_per_s={"ViT-B-32": 500, "ViT-L-14": 125})
    machine = Machine(device="auto", gpus=8, workers=1, rates=rates)
    found = probe(recipe_of(plain), machine)
    assert found.facts.dims == {"b": 512, "l": 768}
    assert found.speeds.embed_s["image"] == pytest.approx(1 / 500 + 1 / 125)
    assert "text" not in found.speeds.embed_s
    assert found.capacity.gpus == 8
    assert found.notes[1] == "no GPU was measured: 100 images a second through all models, by machine.rates (somebody)"
    open_machine = machine.model_copy(update={"gpus": None, "device": "cuda"})
    assert probe(recipe_of(plain), open_machine).notes[2:] == ("machine.gpus is open: 1 counted",)
    without = machine.model_copy(update={"rates": Rates(source="somebody", images_per_s={"ViT-B-32": 500})})
    for other in (without, Machine(device="auto", gpus=1)):
        with pytest.raises(UserError, match=r"machine\.rates\.images_per_s: state ViT-\w-\d\d; it cannot be measured"):
            probe(recipe_of(plain), other)
    plain["models"] = {"x": {"arch": "ViT-B-23", "weights": "openai"}}
    unknown = machine.model_copy(update={"rates": Rates(source="somebody", images_per_s={"ViT-B-23": 500})})
    with pytest.raises(UserError, match="open_clip has no architecture 'ViT-B-23'"):
        probe(recipe_of(plain), unknown)


def test_weights_that_are_not_there_are_the_users_mistake_on_a_processor(tmp_path: Path) -> None:
    pool = webdataset_pool(tmp_path / "pool", 1, 5, 1)
    plain = {
        "pool": {"format": "webdataset", "path": str(pool)},
        "models": {"b": {"arch": "ViT-B-32", "weights": str(tmp_path / "none.safetensors")}},
    }
    with pytest.raises(UserError, match="there is no file"):
        probe(recipe_of(plain), Machine(device="cpu"))


def test_images_that_cannot_be_decoded_are_not_usable(tmp_path: Path) -> None:
    picture = io.BytesIO()
    Image.new("RGB", (32, 24)).save(picture, "JPEG")
    with tarfile.open(tmp_path / "00000.tar", "w") as tar:
        for key, image in enumerate([picture.getvalue(), picture.getvalue()[:-200]]):
            for suffix, data in (("jpg", image), ("txt", b"a caption")):
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    plain = {"pool": {"format": "webdataset", "path": str(tmp_path)}, "models": {"small": {"weights": "tiny"}}}
    assert probe(recipe_of(plain), Machine(device="cpu", workers=1)).facts.usable == 0.5


def test_a_pool_without_samples_is_the_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "00000.tar").write_bytes(bytes(10240))
    plain = {"pool": {"format": "webdataset", "path": str(tmp_path)}}
    with pytest.raises(UserError, match=r"recipe\.pool: no sample in 00000\.tar"):
        probe(recipe_of(plain), Machine(workers=1))


def test_the_command_prints_work_bytes_money_and_what_it_assumes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pool = datacomp_pool(tmp_path / "pool", 2, 60, 1)
    plain = {
        "pool": {"format": "datacomp", "path": str(pool)},
        "models": {"l14": {"image": "l14_img", "text": "l14_txt"}},
        "select": [{"dedup": {"space": "l14", "epsilon": 0.1}}, {"cut": {"score": "l14", "keep": 0.5}}],
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(plain))
    (tmp_path / "machine.yaml").write_text(yaml.safe_dump({"prices": PRICES.model_dump(), "workers": 1}))
    argv = ["plan", str(tmp_path / "recipe.yaml"), "--machine", str(tmp_path / "machine.yaml")]
    assert main([*argv, "--rows", "1200000000", "--set", "select.1.cut.keep=0.25"]) == 0
    shown = capsys.readouterr().out.splitlines()
    words = shown[0].split()
    assert words[:4] == ["1,200,000,000", "samples,", "0", "embedded,"]
    assert words[4:6] == ["at", "most"]
    assert [row.split()[0] for row in shown[2:10]] == [
        *("read", "arrays", "01-dedup", "02-cut", "decide", "write", "total", "read"),
    ]
    assert any(row.startswith("EUR ") and "cores" in row for row in shown)
    assert "- what 01-dedup will drop is not known: counted as nothing" in shown
    assert any(row.startswith("- 01-dedup: ") and row.endswith(" in 352 MB of memory") for row in shown)
    assert "- the larger pool: shards, captions and damage as in this one" in shown
    assert main(argv) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith("118 samples, ")
    assert not any("larger pool" in row for row in shown)


FIRST = {"judge": "filter", "cluster_train": "dedup or density", "cut_score": "cut"}
"""The stage with which a step of a rule begins, where all its survivors are trained on."""

AFTER = {"begin": "decide", "decide": "decide", "show": "decide", "write": "write", "subset": "write"}
"""By the first word of a stage that belongs to no step: its line of a plan."""

WRITTEN = ("decisions", "select", "filtered", "parquet")


def by_line(stages: list[dict[str, Any]], steps: list[str]) -> dict[str, float]:
    """Core-hours of the stages of times.json, summed by the line of a plan that stands for them."""
    hours: dict[str, float] = {}
    left, step = list(steps), ""
    for entry in stages:
        stage = entry["stage"]
        if stage in FIRST:
            step = left.pop(0)
            assert step.partition("-")[2] in FIRST[stage]
        name = stage if stage in ("read", "embed") else AFTER.get(stage.partition("_")[0], step)
        hours[name] = hours.get(name, 0.0) + entry["core_hours"]
    assert not left
    return hours


@pytest.mark.slow
def test_a_run_keeps_writes_and_takes_what_was_planned(tmp_path: Path) -> None:
    plain = {
        "pool": {"format": "webdataset", "path": str(webdataset_pool(tmp_path / "pool", 6, 201, 1))},
        "models": {"small": {"weights": "tiny"}},
        "select": [
            {"filter": {"min_words": 3}},
            {"dedup": {"space": "small", "epsilon": 0.001}},
            {"cut": {"score": "small", "keep": 500}},
            {"density": {"space": "small", "clusters": 20, "keep": 0.5}},
        ],
        "write": {"samples_per_shard": 200},
        "limits": LIMITS,
    }
    found = probe(recipe_of(plain), Machine(device="cpu", workers=1))
    planned = predict(recipe_of(plain), found.facts, found.speeds, found.capacity)
    curated = run_recipe(plain, str(tmp_path / "run"))
    times = json.loads((tmp_path / "run/times.json").read_text())

    assert planned.rows == curated.listed == 6 * 200
    assert planned.unpredictable == ("02-dedup",)
    assert planned.kept == curated.kept == 250  # the cut takes as many, whatever dedup leaves

    stored = times["stored_bytes"]
    written = {f: sum(p.stat().st_size for p in (tmp_path / "run" / f).rglob("*") if p.is_file()) for f in WRITTEN}
    assert planned.stored["samples"] == pytest.approx(stored["read"], rel=0.2)
    assert planned.stored["vectors"] == pytest.approx(stored["embed"], rel=0.2)
    kept = sum(written[folder] for folder in ("filtered", "parquet"))
    assert planned.stored["kept samples"] == pytest.approx(kept, rel=0.2)
    steps = sum(stored.values()) - stored["read"] - stored["embed"] + written["decisions"] + written["select"]
    assert steps / 2 < planned.stored["steps and decisions"] < steps * 2

    taken = by_line(times["stages"], [line.name for line in planned.lines if line.name[0].isdigit()])
    assert set(taken) == {line.name for line in planned.lines}
    assert all(line.core_hours > 0 for line in planned.lines)
    for name in ("read", "embed"):
        assert taken[name] / 5 < line(planned, name).core_hours < taken[name] * 5
    assert sum(taken.values()) / 5 < planned.core_hours < sum(taken.values()) * 5


def test_a_report_says_what_its_hours_leave_out(tmp_path: Path) -> None:
    pool = datacomp_pool(tmp_path / "pool", 3, 60, 1)
    plain = {**datacomp(pool), "select": [{"cut": {"score": "l14", "keep": 0.5}}]}

    def found(recipe: dict[str, Any]) -> tuple[dict[str, int], list[str]]:
        run_recipe(recipe, str(tmp_path / "run"))
        told = json.loads((tmp_path / "run/report/report.json").read_text())["times"]["found"]
        assert told == json.loads((tmp_path / "run/times.json").read_text())["found"]
        return told, re.findall(r"The store had already (.*): what", (tmp_path / "run/report/index.html").read_text())

    first = {**plain, "pool": {**plain["pool"], "path": [str(path) for path in sorted(pool.glob("*.parquet"))[:2]]}}
    assert found(first) == ({}, [])
    # A run that goes on after a crash, or on a larger pool, makes only what the store lacks.
    assert found(plain) == ({"read": 2, "precomputed": 2}, ["read of 2 shards, precomputed of 2 shards"])
    other = {**plain, "select": [{"cut": {"score": "l14", "keep": 0.25}}]}
    assert found(other) == ({"read": 3, "precomputed": 3}, ["read of 3 shards, precomputed of 3 shards"])
    assert found(other)[0] == {"read": 3, "precomputed": 3}  # nothing to do: the times of before


def test_hours_and_bytes_have_the_unit_that_suits() -> None:
    assert [figure(hours) for hours in (0, 0.001, 0.5, 1, 12.345, 1234.5)] == [
        *("0 s", "3.6 s", "30 min", "1 h", "12.3 h", "1,234 h"),
    ]
    assert [size(amount) for amount in (0, 999, 1.5e6, 2.4e14, 3e15)] == [
        "0 B",
        "999 B",
        "1.5 MB",
        "240 TB",
        "3,000 TB",
    ]


def test_prices_and_rates_of_a_machine_are_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    machine, recipe_file = tmp_path / "machine.yaml", tmp_path / "recipe.yaml"
    recipe_file.write_text("pool: {format: webdataset, path: nowhere}\n")
    for text, message in [
        ("prices: {currency: EUR}", "machine.prices.cpu_core_hour: required, but missing"),
        ("rates: {source: me, images_per_s: {ViT-B-32: 0}}", "machine.rates.images_per_s.ViT-B-32: "),
    ]:
        machine.write_text(text + "\n")
        assert main(["plan", str(recipe_file), "--machine", str(machine)]) == 2
        assert f"pairsieve: {message}" in capsys.readouterr().err
