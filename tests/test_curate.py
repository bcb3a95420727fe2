"""The whole path: every sample accounted for, nothing computed twice, the same bytes from everybody."""

import hashlib
import io
import json
import math
import shutil
import uuid
from collections import Counter
from dataclasses import dataclass
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.curate import Curated, curate
from pipeline.errors import UserError
from pipeline.executor import Serial
from pipeline.machine import Machine
from pipeline.recipe import recipe_of
from pipeline.run import Run
from pipeline.storage import Root
from tests import pools

MACHINE = Machine(device="cpu", precision="float32")
MIXED = {"report.json", "times.json", "index.html", "checksums.sha256"}
MODEL = {
    "datacomp": ("l14", {"image": "l14_img", "text": "l14_txt"}),
    "clip_retrieval": ("clip", {"image": "img_emb", "text": "text_emb"}),
    "webdataset": ("small", {"weights": "tiny"}),
    "parquet": ("small", {"weights": "tiny"}),
}
MAKE = {
    "datacomp": lambda folder: pools.datacomp_pool(folder, 3, 40, 1),
    "clip_retrieval": lambda folder: pools.clip_retrieval_pool(folder, 3, 40, 1),
    "webdataset": lambda folder: pools.webdataset_pool(folder, 3, 14, 1),
    "parquet": lambda folder: pools.parquet_pool(folder, 2, 14, 1),
}


def selection(model):
    """A step of every kind that looks at vectors or scores, after a filter."""
    return [
        {"filter": {"min_words": 3}},
        {"dedup": {"space": model, "epsilon": 0.02, "clusters": 3, "iterations": 5}},
        {"cut": {"score": model, "keep": 0.8}},
        {"density": {"space": model, "clusters": 4, "keep": 0.7, "of": "survivors", "iterations": 5}},
        {"random": {"keep": 0.9}},
    ]


def recipe(format, folder, select=None, **more):
    name, model = MODEL[format]
    steps = selection(name) if select is None else select
    return {
        "pool": {"format": format, "path": str(folder)}, "models": {name: model}, "select": steps,
        "write": {"samples_per_shard": 10}, "limits": {"max_unreadable": 0.5}, **more,
    }  # fmt: skip


@dataclass
class Done:
    """A finished run and what it left behind."""

    run: Run
    curated: Curated

    @property
    def stages(self):
        """Stage -> parts that were made."""
        return {entry["stage"]: entry["parts"] for entry in self.run.times}

    @property
    def files(self):
        directory = self.run.directory
        return {path: directory.read(path) for path in directory.list() if not path.startswith("store/")}

    @property
    def outputs(self):
        """What must be equal between equal runs: all but times.json, the report, and its lines of the checksums."""
        found = {path: data for path, data in self.files.items() if not path.startswith("report/")}
        lines = found.pop("checksums.sha256").decode().splitlines()
        del found["times.json"]
        return found | {"checksums": [line for line in lines if "  report/" not in line]}

    def table(self, folder):
        parts = [
            data for path, data in self.files.items() if path.startswith(f"{folder}/") and path.endswith(".parquet")
        ]
        return pa.concat_tables([pq.read_table(io.BytesIO(data)) for data in parts])

    @property
    def decisions(self):
        return self.table("decisions").to_pylist()


def fresh():
    return f"memory://{uuid.uuid4().hex}"


def done(plain, directory=None, store=None, machine=MACHINE, executor=None, group_units=2):
    directory = directory or fresh()
    run = Run(Root(store or f"{directory}/store"), Root(directory), executor or Serial(), machine)
    return Done(run, curate(run, recipe_of(plain), group_units=group_units))


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("pools")
    return {format: make(root / format) for format, make in MAKE.items()}


@pytest.fixture(scope="session")
def runs(folders):
    """A finished run of each layout."""
    return {format: done(recipe(format, folder)) for format, folder in folders.items()}


@pytest.fixture
def again(runs):
    """The finished run of a layout, to be run again with another recipe in a directory of its own."""

    def run(format, plain, **more):
        return done(plain, store=runs[format].run.store.url, **more)

    return run


def oracle(plain, rows):
    """What each step leaves, worked out from the decisions' own values; the mistakes that it finds."""
    order = {id(row): at for at, row in enumerate(rows)}
    wrong = []
    for number, step in enumerate(plain["select"], 1):
        ((kind, rule),) = step.items()
        name = f"{number:02d}-{kind}"
        entered = [r for r in rows if r["step"] is None or r["step"] >= name]
        left = {order[id(r)] for r in entered if r["step"] != name}
        base = len(rows) if rule.get("of") == "pool" else len(entered)
        keep = rule.get("keep")
        if kind in ("cut", "random", "density"):
            count = keep if isinstance(keep, int) else math.floor(Decimal(str(keep)) * base)
        if kind == "cut":
            have = [r for r in entered if r[f"score_{rule['score']}"] is not None]
            best = sorted(have, key=lambda r: (-r[f"score_{rule['score']}"], r["uid"], order[id(r)]))[:count]
        elif kind == "random":
            salt = f"{plain.get('seed', 0)}/{name}"
            drawn = {r["uid"]: hashlib.sha256(f"{salt}/{r['uid']}".encode()).digest()[:8] for r in entered}
            best = sorted(entered, key=lambda r: (drawn[r["uid"]], r["uid"], order[id(r)]))[:count]
        elif kind == "dedup":
            best = [r for r in entered if r["reason"] != "duplicate" or r["step"] != name]
            wrong += [
                r for r in entered if r["step"] == name and not r["value"] > r["threshold"] == 1 - rule["epsilon"]
            ]
        else:
            best = [r for r in entered if r["step"] != name]
            wrong += [name] * (kind == "density" and len(best) != min(count, len(entered)))
        wrong += [name] * ({order[id(r)] for r in best} != left)
    return wrong


LISTED = {"datacomp": 3 * 39, "clip_retrieval": 3 * 39, "webdataset": 3 * 13, "parquet": 2 * 14}
PROBLEMS = {
    "datacomp": {"missing_caption": 3, "bad_vector": 6},
    "clip_retrieval": {"missing_caption": 3, "bad_vector": 6},
    "webdataset": {"missing_caption": 3},
    "parquet": {"missing_caption": 2, "missing_image": 2},
}


@pytest.mark.parametrize("format", MAKE)
def test_every_sample_is_kept_or_has_a_reason(format, runs, folders):
    rows, curated = runs[format].decisions, runs[format].curated
    assert len(rows) == curated.listed == LISTED[format]
    for row in rows:
        kept = row["kept"]
        assert kept == (row["step"] is None) == (row["reason"] is None)
        assert not kept or row["problem"] is row["value"] is row["threshold"] is row["duplicate_of"] is None
        assert (row["problem"] is None) == (row["step"] != "00-read")
        assert (row["duplicate_of"] is None) == (row["reason"] != "duplicate")
    assert Counter(row["problem"] for row in rows if row["problem"]) == PROBLEMS[format]
    assert curated.kept == sum(row["kept"] for row in rows) > 0
    assert oracle(recipe(format, folders[format]), rows) == []


@pytest.mark.parametrize("format", MAKE)
def test_the_funnel_adds_up(format, runs):
    rows, funnel = runs[format].decisions, runs[format].curated.funnel
    dropped = Counter(row["step"] for row in rows)
    left = len(rows)
    for name, entered, after in funnel:
        assert (entered, after) == (left, left - dropped[name])
        left = after
    assert [name for name, _, _ in funnel] == ["00-read", "01-filter", "02-dedup", "03-cut", "04-density", "05-random"]
    about = json.loads(runs[format].files["run.json"])
    assert [tuple(line) for line in about["funnel"]] == list(funnel)
    assert sum(n for step in about["drops"].values() for n in step["reasons"].values()) == funnel[0][2] - left


@pytest.mark.parametrize("format", MAKE)
def test_a_second_run_computes_nothing_and_writes_the_same_bytes(format, runs, folders):
    before = runs[format].files
    second = done(recipe(format, folders[format]), runs[format].run.directory.url)
    assert second.run.times == []
    assert second.curated == runs[format].curated
    assert {p: d for p, d in second.files.items() if p.rpartition("/")[2] not in MIXED} == {
        p: d for p, d in before.items() if p.rpartition("/")[2] not in MIXED
    }


@pytest.mark.parametrize("format", MAKE)
def test_every_file_is_in_the_checksums(format, runs):
    files = runs[format].files
    lines = dict(reversed(line.split("  ")) for line in files["checksums.sha256"].decode().splitlines())
    assert set(lines) == set(files) - {"times.json", "checksums.sha256"}
    assert all(hashlib.sha256(files[path]).hexdigest() == digest for path, digest in lines.items())


def test_the_resolved_recipe_runs_to_the_same_bytes(runs, tmp_path):
    text = runs["datacomp"].files["recipe.yaml"].decode()
    from pipeline.recipe import load_recipe

    (tmp_path / "r.yaml").write_text(text)
    directory = fresh()
    run = Run(runs["datacomp"].run.store, Root(directory), Serial(), MACHINE)
    curate(run, load_recipe(tmp_path / "r.yaml"), group_units=2)
    assert Done(run, None).outputs == runs["datacomp"].outputs


def test_a_changed_threshold_computes_no_evidence(again, folders):
    plain = recipe("webdataset", folders["webdataset"])
    plain["select"][1]["dedup"]["epsilon"] = 0.05
    plain["select"][2]["cut"]["keep"] = 0.6
    changed = again("webdataset", plain)
    assert not {"read", "embed", "begin", "judge", "dedup_within"} & set(changed.stages)
    assert oracle(plain, changed.decisions) == []


def test_the_results_of_one_shuffle_are_not_those_of_another(folders):
    """Two recipes with one store: the second must not be served what the first compared, or its subset."""
    store = fresh()
    name, _ = MODEL["datacomp"]
    for keep in ("hard", "easy"):
        for epsilon, clusters in [(0.02, 2), (0.3, 5)]:
            select = [{"dedup": {"space": name, "epsilon": epsilon, "clusters": clusters, "keep": keep}}]
            plain = recipe("datacomp", folders["datacomp"], select)
            shared, alone = done(plain, store=store), done(plain)
            assert shared.outputs == alone.outputs


def test_a_grown_pool_embeds_only_its_new_shard(again, folders, tmp_path):
    shutil.copytree(folders["webdataset"], tmp_path / "pool")
    extra = pools.webdataset_pool(tmp_path / "extra", 4, 14, 1)
    for path in extra.glob("00003*"):
        shutil.copy(path, tmp_path / "pool")
    grown = again("webdataset", recipe("webdataset", tmp_path / "pool"))
    assert (grown.stages["read"], grown.stages["embed"]) == (4, 1)  # a moved file is read once to be recognised
    assert grown.curated.listed == 4 * 13
    alone = done(recipe("webdataset", tmp_path / "pool"))
    assert grown.outputs == alone.outputs


def test_a_moved_pool_is_recognised_by_its_content(again, runs, folders, tmp_path):
    shutil.copytree(folders["webdataset"], tmp_path / "elsewhere")
    moved = again("webdataset", recipe("webdataset", tmp_path / "elsewhere"))
    assert set(moved.stages) <= {
        "read",
        "decide",
        "show_problems",
        "show_assignment",
        "write_tar",
        "write_parquet",
        "write_subset",
    }
    differ = {path for path, data in moved.outputs.items() if data != runs["webdataset"].outputs.get(path)}
    assert differ <= {"recipe.yaml", "checksums"}
    third = again("webdataset", recipe("webdataset", tmp_path / "elsewhere"), directory=moved.run.directory.url)
    assert third.run.times == []


@pytest.mark.parametrize(
    ("format", "machine"),
    [
        ("datacomp", Machine(threads=3, workers=7, decoders=2, image_batch=5, text_batch=5, device="cpu")),
        ("webdataset", Machine(device="cpu", precision="float32", decoders=3, workers=2, unit_deadline_s=99)),
    ],
)
def test_another_machine_gives_the_same_bytes(format, machine, runs, folders):
    assert done(recipe(format, folders[format]), machine=machine).outputs == runs[format].outputs


def test_a_machine_that_only_looks_computes_nothing(again, folders):
    machine = Machine(device="cpu", precision="float32", threads=2, image_batch=3)
    assert "embed" not in again("webdataset", recipe("webdataset", folders["webdataset"]), machine=machine).stages


def test_groups_change_the_files_but_not_the_decisions(runs, folders):
    one = done(recipe("datacomp", folders["datacomp"]), group_units=1)
    assert one.decisions == runs["datacomp"].decisions
    assert len([p for p in one.files if p.startswith("decisions/")]) == 3
    for path in ("subset.npy", "select/02-dedup/centroids.npy", "select/04-density/clusters.parquet"):
        assert one.files[path] == runs["datacomp"].files[path]


def test_a_broken_shard_is_named_and_the_rest_go_on(tmp_path, again, runs, folders):
    shutil.copytree(folders["webdataset"], tmp_path / "pool")
    cut = (tmp_path / "pool/00001.tar").read_bytes()
    (tmp_path / "pool/00001.tar").write_bytes(cut[: len(cut) // 2 + 100])
    (tmp_path / "pool/00003.tar").write_bytes(b"no tar at all" * 100)
    broken = again("webdataset", recipe("webdataset", tmp_path / "pool", [{"filter": {"min_words": 1}}]))
    assert broken.curated.damaged == 2 and broken.curated.shards == 4
    assert broken.curated.too_damaged is False  # two of four shards are the limit itself
    problems = {(row["shard"], row["reason"]) for row in broken.table("problems").to_pylist() if row["key"] is None}
    assert problems == {("00001.tar", "truncated"), ("00003.tar", "not_a_tar")}
    whole = {(r["shard"], r["key"], r["uid"]) for r in runs["webdataset"].decisions if r["shard"] != "00001.tar"}
    assert whole <= {(r["shard"], r["key"], r["uid"]) for r in broken.decisions}
    assert {r["shard"] for r in broken.decisions if r["kept"]} >= {"00000.tar", "00002.tar"}


@pytest.mark.parametrize(("limit", "too_damaged"), [(0.0, True), (0.29, False), (0.2899999, True), (1.0, False)])
def test_more_damage_than_the_limit_is_told(limit, too_damaged, tmp_path):
    captions = [""] * 29 + ["fine"] * 71  # in binary 0.29 x 100 is less than 29
    pq.write_table(pa.table({"url": [f"u{n}" for n in range(100)], "caption": captions}), tmp_path / "x.parquet")
    plain = {
        "pool": {"format": "datacomp", "path": str(tmp_path)},
        "limits": {"max_unreadable": limit},
        "write": {"formats": []},
    }
    curated = done(plain).curated
    assert (curated.unreadable, curated.too_damaged) == (29, too_damaged)


def test_a_file_that_is_gone_or_cut_is_written_again(tmp_path, folders, runs):
    url = fresh()
    store = runs["webdataset"].run.store.url
    before = done(recipe("webdataset", folders["webdataset"]), url, store)
    root = Root(url)
    for path in ("filtered/00000000.tar", "decisions/00000001.parquet", "subset.npy", "select/03-cut/cut.json"):
        root.delete(path)
    root.write("problems/00000000.parquet", b"cut")
    repaired = done(recipe("webdataset", folders["webdataset"]), url, store)
    assert repaired.outputs == before.outputs


def test_a_remote_pool_leaves_no_loose_record_for_each_of_its_units(folders):
    shards = Root(fresh())
    for path in sorted(folders["webdataset"].iterdir()):
        shards.write(path.name, path.read_bytes())
    plain, directory, store = recipe("webdataset", shards.url, []), fresh(), fresh()
    run = Run(Root(store), Root(directory), Serial(), MACHINE, segment_parts=1)
    curate(run, recipe_of(plain))
    parts = {entry["stage"]: entry["parts"] for entry in run.times}
    assert (parts["read"], "embed" in parts) == (3, False)  # the vectors were made along with the read
    records = Root(store)
    for stage in ("read", "embed"):
        assert (len(records.list(f"segments/{stage}")), records.list(f"receipts/{stage}")) == (3, {})
    assert [path.count("/") for path in records.list("listed")] == [1] * 3
    assert not {"read", "embed"} & done(plain, directory, store).stages.keys()


def test_another_recipe_in_the_same_directory_leaves_nothing_behind(folders):
    url = fresh()
    plain = recipe("datacomp", folders["datacomp"])
    done(plain, url)
    short = {**plain, "select": [{"random": {"keep": 0.5}}], "write": {"formats": ["parquet"]}, "models": {}}
    assert done(short, url).outputs == done(short).outputs
    assert not Root(url).list("select/02-dedup") and Root(url).bytes("subset.npy") is None


def test_files_of_equal_length_of_another_recipe_are_not_taken_for_ours(folders):
    url = fresh()
    plains = [recipe("datacomp", folders["datacomp"], [{"random": {"keep": 20}}], seed=seed) for seed in (0, 1)]
    first, other, back = (done(plain, url) and done(plain, url).outputs for plain in (*plains, plains[0]))
    assert first["subset.npy"] != other["subset.npy"] and len(first["subset.npy"]) == len(other["subset.npy"])
    assert back == first


def scores(found, name="small"):
    return {row["key"]: row[f"score_{name}"] for row in found.decisions}


def test_a_leading_filter_spares_the_embedding_unless_told_otherwise(again, folders):
    select = [
        {"filter": {"columns": {"clip_l14_similarity_score": {"min": 0.5}}}},
        {"cut": {"score": "small", "min": -1}},
    ]
    spared = again("webdataset", recipe("webdataset", folders["webdataset"], select))
    dropped = {row["key"] for row in spared.decisions if row["step"] == "01-filter"}
    assert dropped
    have = {key for key, score in scores(spared).items() if score is not None}
    assert have == {row["key"] for row in spared.decisions if row["step"] != "01-filter" and not row["problem"]}
    every = again("webdataset", recipe("webdataset", folders["webdataset"], select, embed_all=True))
    assert {key for key, score in scores(every).items() if score is None} == {
        row["key"] for row in every.decisions if row["problem"]
    }
    assert [r["step"] for r in every.decisions] == [r["step"] for r in spared.decisions]


def test_a_random_draw_before_the_first_model_spares_nothing(again, folders):
    plain = recipe(
        "webdataset", folders["webdataset"], [{"random": {"keep": 0.5}}, {"cut": {"score": "small", "keep": 3}}]
    )
    drawn = again("webdataset", plain)
    assert all((row["score_small"] is None) == bool(row["problem"]) for row in drawn.decisions)
    assert oracle(plain, drawn.decisions) == []


def test_no_survivor_in_the_middle_is_no_trouble(again, folders):
    name, _ = MODEL["datacomp"]
    select = [{"cut": {"score": name, "min": 5}}, *selection(name)]
    empty = again("datacomp", recipe("datacomp", folders["datacomp"], select))
    assert empty.curated.kept == 0
    assert [(entered, left) for _, entered, left in empty.curated.funnel[2:]] == [(0, 0)] * 5
    drops = json.loads(empty.files["run.json"])["drops"]
    assert all(drops[f"0{n}-{next(iter(step))}"]["reasons"] == {} for n, step in enumerate(select[1:], 2))


def test_a_pool_of_one_sample(tmp_path):
    folder = pools.webdataset_pool(tmp_path / "pool", 1, 1, 3)
    one = done(recipe("webdataset", folder))
    assert [entered for _, entered, _ in one.curated.funnel] == [1, 1, 1, 1, 0, 0]
    kept = done(recipe("webdataset", folder, [{"density": {"space": "small", "clusters": 9, "keep": 1.0}}]))
    assert kept.curated.kept == 1


def test_equal_pairs_share_a_uid_and_keep_their_rows(tmp_path):
    folder = pools.webdataset_pool(tmp_path / "pool", 1, 3, 3)
    for suffix in (".tar", ".parquet", "_stats.json"):
        shutil.copy(folder / f"00000{suffix}", folder / f"00001{suffix}")
    twice = done(recipe("webdataset", folder, [{"dedup": {"space": "small", "epsilon": 0.0001, "clusters": 1}}]))
    rows = twice.decisions
    assert [r["uid"] for r in rows[:3]] == [r["uid"] for r in rows[3:]]
    assert [r["kept"] for r in rows] == [True] * 3 + [False] * 3
    assert [r["duplicate_of"] for r in rows[3:]] == [r["uid"] for r in rows[:3]]
    assert {r["value"] for r in rows[3:]} == {1.0}


def test_two_models_share_one_decode(again, folders):
    plain = recipe("parquet", folders["parquet"])
    plain["models"] = {"one": {"weights": "tiny"}, "two": {"weights": "tiny"}}
    plain["select"] = [{"cut": {"score": "one", "keep": 0.5}}, {"cut": {"score": "two", "keep": 3}}]
    both = done(plain)
    assert {stage: parts for stage, parts in both.stages.items() if "embed" in stage} == {"embed x2": 2}
    assert [r["score_one"] for r in both.decisions] == [r["score_two"] for r in both.decisions]


@pytest.mark.parametrize(
    ("format", "change", "message"),
    [
        (
            "webdataset",
            {"select": [{"cut": {"score": "column:similarty", "keep": 0.5}}]},
            "recipe.select.0.cut: no shard of the pool has the column 'similarty'",
        ),
        (
            "webdataset",
            {"select": [{"random": {"keep": 0.5}}, {"filter": {"columns": {"captoin": {"equals": "x"}}}}]},
            "recipe.select.1.filter: no shard of the pool has the column 'captoin'; did you mean 'caption'?",
        ),
        (
            "datacomp",
            {"models": {"small": {"weights": "tiny"}}, "select": []},
            "recipe.models.small: this pool has no images",
        ),
        ("datacomp", {"write": {"formats": ["webdataset"]}}, "recipe.write.formats: webdataset needs a pool of tars"),
        (
            "webdataset",
            {"models": {"small": {"weights": "tiny", "sha256": "00" * 32}}},
            "recipe.models.small: its weights have sha256 ",
        ),
        ("datacomp", {"models": {"l14": {"image": "l41_img"}}, "select": []}, "no array 'l41_img'"),
        ("webdataset", {"pool": {"format": "webdataset", "path": "/nowhere"}}, "pool.path: /nowhere"),
    ],
)
def test_a_mistake_is_told_before_any_image_is_embedded(format, change, message, folders):
    url = fresh()
    with pytest.raises(UserError) as error:
        done({**recipe(format, folders[format]), **change}, url)
    assert message in str(error.value)
    assert Root(f"{url}/store").list("receipts/embed") == {}


def test_a_pool_without_a_sample_is_refused(tmp_path):
    pq.write_table(pa.table({"url": ["a"], "caption": ["b"], "status": ["failed"]}), tmp_path / "x.parquet")
    with pytest.raises(UserError, match=r"recipe\.pool: no sample in 1 shards"):
        done({"pool": {"format": "datacomp", "path": str(tmp_path)}})


def test_a_column_may_be_a_score_and_a_text_and_may_be_named_as_one_of_ours(tmp_path):
    names = ["value", "step", "kept", "reason", "threshold", "key", "score_m"]
    columns = {name: [float(n) for n in range(12)] for name in names}
    table = {
        "url": [str(n) for n in range(12)],
        "caption": ["a b c"] * 12,
        "x": [float(n) for n in range(12)],
        **columns,
    }
    pq.write_table(pa.table(table), tmp_path / "0.parquet")
    bounds = {name: {"min": at} for at, name in enumerate(names)}
    select = [
        {"cut": {"score": "column:x", "keep": 10}},
        {"filter": {"columns": {"x": {"not_in": ["11"]}, **bounds}}},
    ]
    plain = {"pool": {"format": "parquet", "path": str(tmp_path / "0.parquet")}, "select": select}
    found = done(plain).decisions
    assert [row["x"] for row in found] == table["x"]
    assert [row["reason"] for row in found] == ["low_score"] * 2 + [f"columns.{n}" for n in names[3:]] + [None] * 5 + [
        "columns.x"
    ]
    assert [row["kept"] for row in found] == [False] * 6 + [True] * 5 + [False]


def test_an_unfinished_directory_has_no_checksums(folders):
    url = fresh()
    done(recipe("datacomp", folders["datacomp"], []), url)
    with pytest.raises(UserError):
        done(recipe("datacomp", folders["datacomp"], [{"cut": {"score": "column:none", "keep": 2}}]), url)
    assert Root(url).bytes("checksums.sha256") is None


def test_numbers_of_the_subset_are_the_kept_uids(runs):
    for found in runs.values():
        pairs = np.load(io.BytesIO(found.files["subset.npy"]), allow_pickle=False).tolist()
        assert [f"{a:016x}{b:016x}" for a, b in pairs] == sorted({r["uid"] for r in found.decisions if r["kept"]})


@pytest.mark.ray
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_ray_writes_the_same_bytes_as_one_process(workers, folders, tmp_path):
    from pipeline.ray_executor import RayExecutor

    machine = Machine(device="cpu", precision="float32", threads=1, workers=workers)
    executor = RayExecutor(machine)
    try:
        for format in ("datacomp", "webdataset"):
            plain = recipe(format, folders[format])
            alone = done(plain, machine=machine)
            spread = done(plain, str(tmp_path / format), machine=machine, executor=executor)
            assert spread.outputs == alone.outputs
    finally:
        executor.close()
