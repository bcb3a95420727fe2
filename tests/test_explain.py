"""explain says of every row of a uid what each step found, as the decisions and the evidence have it."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.cli import main
from pipeline.errors import UserError
from pipeline.explain import Explained, StepVerdict, explain, rows_of_uid
from pipeline.machine import Machine
from pipeline.record import Unreadable
from pipeline.report import replace_report
from pipeline.storage import Root
from tests.pools import datacomp_pool, planted
from tests.runs import datacomp, datacomp_run, run_recipe, webdataset, webdataset_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return datacomp_run(tmp_path_factory.mktemp("explained"))


def rows_of(run: Path, folder: str = "decisions") -> list[dict[str, Any]]:
    return [row for path in sorted((run / folder).iterdir()) for row in pq.read_table(path).to_pylist()]


def explained(run: Path, uid: str) -> list[Explained]:
    return explain(Root(str(run)), Root(str(run / "store")), uid)


def first(run: Path, **wanted: Any) -> tuple[dict[str, Any], dict[str, StepVerdict]]:
    """The first decision with some values, and the verdicts on its sample."""
    row = next(row for row in rows_of(run) if all(row[name] == value for name, value in wanted.items()))
    (found,) = explained(run, row["uid"])
    assert (found.shard, found.key, found.kept) == (row["shard"], row["key"], row["kept"])
    return row, {verdict.step: verdict for verdict in found.verdicts}


def test_every_sample_is_explained_as_it_was_decided(run: Path) -> None:
    for row in rows_of(run)[::2]:
        (found,) = explained(run, row["uid"])
        order = ["00-read", "01-filter", "02-dedup", "03-cut", "04-density", "05-random"]
        assert [verdict.step for verdict in found.verdicts] == order
        at = order.index(row["step"]) if row["step"] else len(order)
        expected = ["passed"] * at + ["dropped"] * (not row["kept"]) + ["not reached"] * (len(order) - at - 1)
        assert [verdict.outcome for verdict in found.verdicts] == expected[: len(order)]
        reasons = [verdict.reason for verdict in found.verdicts if verdict.reason]
        assert reasons == ([row["reason"]] if row["reason"] else [])
        assert found.scores == {name: row[name] for name in ("score_l14", "clip_l14_similarity_score")}


def test_captions_come_from_the_store_and_are_left_out_without_it(run: Path, tmp_path: Path) -> None:
    shards = [planted(shard, 60, 1) for shard in range(3)]
    captions = {uid: text for made in shards for uid, text in zip(made.fields["uid"], made.fields["text"], strict=True)}
    for row in rows_of(run)[::7]:
        assert explained(run, row["uid"])[0].caption == captions[row["uid"]]
    alone = Path(shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("store")))
    (found,) = explained(alone, rows_of(run)[-1]["uid"])
    assert found.caption is None
    assert found.verdicts[1].facts == {}


def test_a_filter_tells_what_it_measured_against_what(run: Path) -> None:
    row, verdicts = first(run, kept=True)
    score = row["clip_l14_similarity_score"]
    assert verdicts["01-filter"].facts == {
        "min_words": "10 against 3, holds",
        "columns.clip_l14_similarity_score": f"{score:g} against 0.1, holds",
    }
    row, verdicts = first(run, step="01-filter")
    assert verdicts["01-filter"].reason == "columns.clip_l14_similarity_score"
    assert verdicts["01-filter"].facts["columns.clip_l14_similarity_score"].endswith("against 0.1, fails")
    assert verdicts["01-filter"].facts["value"] == row["value"]


def test_a_cut_tells_score_and_threshold(run: Path) -> None:
    threshold = json.loads((run / "select/03-cut/cut.json").read_text())["threshold"]
    row, verdicts = first(run, kept=True)
    assert verdicts["03-cut"].facts == {"value": row["score_l14"], "threshold": threshold}
    row, verdicts = first(run, step="03-cut")
    assert verdicts["03-cut"].facts == {"value": row["value"], "threshold": threshold}
    assert row["value"] < threshold


def test_dedup_tells_the_cluster_the_cosine_and_the_twin(run: Path) -> None:
    evidence = {row["uid"]: row for row in rows_of(run, "select/02-dedup/assign")}
    for wanted in ({"step": "02-dedup"}, {"kept": True}):
        row, verdicts = first(run, **wanted)
        facts = verdicts["02-dedup"].facts
        mine = evidence[row["uid"]]
        assert {name: facts[name] for name in ("cluster", "distance", "max_cosine", "duplicate_of")} == {
            name: mine[name] for name in ("cluster", "distance", "max_cosine", "duplicate_of")
        }
        assert facts["threshold"] == 1 - 0.07
        assert ("value" in facts) == ("step" in wanted)


def test_density_tells_distance_quota_and_the_last_kept_distance(run: Path) -> None:
    evidence = {row["uid"]: row for row in rows_of(run, "select/04-density/assign")}
    clusters = pq.read_table(run / "select/04-density/clusters.parquet").to_pylist()
    row, verdicts = first(run, step="04-density")
    cluster = clusters[evidence[row["uid"]]["cluster"]]
    assert verdicts["04-density"].facts == {
        "cluster": cluster["cluster"],
        "distance": evidence[row["uid"]]["distance"],
        "cluster_size": cluster["size"],
        "quota": cluster["quota"],
        "value": row["value"],
        "threshold": row["threshold"],
    }
    _, verdicts = first(run, kept=True)
    assert set(verdicts["04-density"].facts) == {"cluster", "distance", "cluster_size", "quota"}


def test_a_sample_with_a_problem_reached_no_step(run: Path) -> None:
    _, verdicts = first(run, step="00-read", problem="missing_caption")
    assert verdicts["00-read"] == StepVerdict("00-read", "dropped", "missing_caption")
    assert {v.outcome for step, v in verdicts.items() if step != "00-read"} == {"not reached"}


def test_all_rows_of_a_uid_are_explained(tmp_path: Path) -> None:
    run = webdataset_run(tmp_path)
    shutil.copy(tmp_path / "pool/00000.tar", tmp_path / "pool/00003.tar")  # its keys and pairs come again
    run_recipe(webdataset(tmp_path / "pool"), str(run))
    row = next(row for row in rows_of(run) if not row["problem"])
    assert [found.shard for found in explained(run, row["uid"])] == ["00000.tar", "00003.tar"]


def test_the_evidence_of_rows_with_one_uid_is_kept_apart(tmp_path: Path) -> None:
    pool = datacomp_pool(tmp_path / "pool", 1, 40, 1)
    (metadata,) = pool.glob("*.parquet")
    shutil.copy(metadata, pool / "copy.parquet")
    arrays = np.load(metadata.with_suffix(".npz"))
    np.savez(pool / "copy.npz", **{name: arrays[name][::-1] for name in arrays})
    run_recipe(datacomp(pool), str(tmp_path / "run"))
    distance = {(r["uid"], r["shard"]): r["distance"] for r in rows_of(tmp_path / "run", "select/02-dedup/assign")}
    uids = [uid for uid, shard in distance if shard == "copy.parquet" and (uid, metadata.name) in distance]
    assert len(uids) > 5
    for uid in uids:
        for found in explained(tmp_path / "run", uid):
            assert found.verdicts[2].facts["distance"] == distance[uid, found.shard]


def test_strangers_text_does_not_move_what_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pool = datacomp_pool(tmp_path / "pool", 1, 9, 1)
    (metadata,) = pool.glob("*.parquet")
    table = pq.read_table(metadata)
    table = table.drop_columns(["uid"]).append_column("key", pa.array([f"{n}\r\x1b[2Jkept" for n in range(9)]))
    pq.write_table(table, metadata)
    run_recipe(datacomp(pool), str(tmp_path / "run"))
    for row in rows_of(tmp_path / "run"):
        assert main(["explain", str(tmp_path / "run"), row["uid"]]) == 0
        assert row["key"].endswith("kept")
    said = capsys.readouterr().out
    assert "0  [2Jkept: " in said and not set(said) & set("\r\x1b")


def test_a_uid_that_is_malformed_or_unknown_is_a_mistake(run: Path) -> None:
    uid = rows_of(run)[0]["uid"]
    assert explained(run, uid.upper()) == explained(run, uid)
    with pytest.raises(UserError, match="0123: a uid is 32 hex digits"):
        explained(run, "0123")
    unknown = hashlib.md5(b"unknown").hexdigest()
    with pytest.raises(UserError, match=f"{unknown}: no sample of .* has this uid"):
        explained(run, unknown)


def test_a_run_without_its_decisions_explains_nothing(run: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(run, tmp_path / "run"))
    shutil.rmtree(copied / "decisions")
    with pytest.raises(Unreadable, match="decisions: missing"):
        explained(copied, "0" * 32)
    with pytest.raises(Unreadable, match="decisions: missing"):
        replace_report(Root(str(copied)), Root(str(copied / "store")), Machine())


def test_rows_beyond_the_first_row_group_are_found(run: Path, tmp_path: Path) -> None:
    table = pa.table({"uid": [hashlib.md5(b"%d" % i).hexdigest() for i in range(50)], "row": range(50)})
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=20, bloom_filter_options={"uid": {"ndv": 20}})
    found, rows = rows_of_uid(Root(str(tmp_path)), "t.parquet", table["uid"][45].as_py())
    assert (found, rows) == ([(45, {"uid": table["uid"][45].as_py(), "row": 45})], 50)
