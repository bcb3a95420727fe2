"""dedup as a step: brute force over every cluster decides, whatever the buckets, groups and units."""

import numpy as np
import pyarrow as pa
import pytest

from pipeline import vectors
from pipeline.cluster import Clustering
from pipeline.select.dedup import Buckets, Dedup, Scatter
from tests import steps


def planted(rows, seed=0, dims=8):
    """float16 (rows, dims): a few directions, many near and some exact copies."""
    rng = np.random.default_rng(seed)
    vec_ND = rng.normal(size=(4, dims))[rng.integers(4, size=rows)] + 0.2 * rng.normal(size=(rows, dims))
    for row in range(1, rows, 3):
        vec_ND[row] = vec_ND[rng.integers(row)] + rng.choice([0, 0.01]) * rng.normal(size=dims)
    return vectors.unit16(vec_ND)[0]


def uids_of(rows):
    """Distinct uids in the order of neither the rows nor their last digits."""
    return [(row * 37 % 61) << 64 | (row * 11 % 97) << 8 | row // 61 for row in range(rows)]


def step_of(vec_ND, ends=(), group_units=1, uids=None, text=False, problem=()):
    uids = uids_of(len(vec_ND)) if uids is None else uids
    rows = [
        {"uid": uid.to_bytes(16, "big")} | ({"problem": "bad_metadata"} if n in problem else {})
        for n, uid in enumerate(uids)
    ]
    cuts = list(zip([0, *ends], [*ends, len(vec_ND)], strict=True))
    flip = np.ones((len(vec_ND), 1)) - 2 * (np.arange(len(vec_ND)) % 2)[:, None]
    sides = ((vec_ND * flip)[:, ::-1], vec_ND) if text else (vec_ND, None)
    evidence = [steps.evidence_of(sides[0][a:b], None if sides[1] is None else sides[1][a:b]) for a, b in cuts]
    return steps.step_of(
        steps.memory_run(), [steps.samples_of(*rows[a:b]) for a, b in cuts], evidence={"clip": evidence},
        group_units=group_units, name="01-dedup",
    )  # fmt: skip


def expected(rule, vec_ND, uids, cluster_N, distance_N, alive):
    """max_cosine and duplicate_of of every row, by the definition."""
    cos_NN = vectors.all_cosines(vec_ND, vec_ND)
    hash_N = vectors.draw(0, "01-dedup", [f"{uid:032x}" for uid in uids])
    value = {"hard": lambda r: -distance_N[r], "easy": lambda r: distance_N[r], "random": lambda r: hash_N[r]}[
        rule.keep
    ]
    min_cos = 1 - rule.epsilon
    found = {}
    for cluster in set(cluster_N[alive].tolist()):
        order = sorted((r for r in alive if cluster_N[r] == cluster), key=lambda r: (value(r), uids[r], r))
        kept = []
        for row in order:
            best = max((float(cos_NN[row, j]) for j in kept), default=-1.0)
            twin = next((j for j in kept if cos_NN[row, j] == np.float32(best)), None)
            found[row] = (best, None if twin is None else uids[twin])
            if rule.rule == "official" or best <= min_cos:
                kept.append(row)
    return found


def check(rule, step, outcome, vec_ND, uids, alive):
    """Compare the evidence and the state of a step with brute force."""
    assign = outcome.assign
    ends = np.cumsum([0, *(len(step.run.rows(p).table()) for p in step.state.parts)])
    rows, answers = [], []
    for part, first in zip(assign.parts, ends, strict=False):
        table = step.run.rows(part).table()
        rows += [first + at for at in table.column("at").to_pylist()]
        answers += table.to_pylist()
    assert rows == alive
    cluster_N, distance_N = np.full(len(vec_ND), -1), np.full(len(vec_ND), np.nan)
    for row, answer in zip(rows, answers, strict=True):
        cluster_N[row], distance_N[row] = answer["cluster"], answer["distance"]
    truth = expected(rule, vec_ND, uids, cluster_N, distance_N, alive)
    for row, answer in zip(rows, answers, strict=True):
        twin = answer["duplicate_of"]
        assert (answer["max_cosine"], twin and int.from_bytes(twin, "big")) == truth[row], row
    for row, decision in enumerate(steps.state_of(step, outcome).to_pylist()):
        if row in truth:
            cos, twin = truth[row]
            if cos > 1 - rule.epsilon:
                assert (decision["reason"], decision["value"], decision["threshold"]) == (
                    "duplicate",
                    cos,
                    1 - rule.epsilon,
                )
                assert int.from_bytes(decision["duplicate_of"], "big") == twin
            else:
                assert (decision["dropped_by"], decision["value"], decision["duplicate_of"]) == (0, None, None)
    return truth


@pytest.mark.parametrize("keep", ["hard", "easy", "random"])
@pytest.mark.parametrize("rule", ["official", "greedy"])
@pytest.mark.parametrize("partition", [((), 1), ((10, 11, 40), 1), ((10, 10, 40), 2)])
def test_a_step_equals_brute_force(keep, rule, partition):
    vec_ND, problem = planted(60), [2, 30]
    dedup = Dedup("clip", 0.02, clusters=3, keep=keep, rule=rule, iterations=5)
    step = step_of(vec_ND, *partition, problem=problem)
    alive = [row for row in range(60) if row not in problem]
    outcome = dedup.apply(step)
    truth = check(dedup, step, outcome, vec_ND, uids_of(60), alive)
    dropped = sum(cos > 1 - 0.02 for cos, _ in truth.values())
    assert 5 < dropped < 40
    assert sum(f["dropped"].get("duplicate", 0) for f in outcome.state.facts()) == dropped


def test_text_vectors_are_compared_in_their_own_space():
    vec_ND = planted(40, seed=2)
    dedup = Dedup("clip.text", 0.02, clusters=2, iterations=5)
    step = step_of(vec_ND, text=True)
    check(dedup, step, dedup.apply(step), vec_ND, uids_of(40), list(range(40)))


def test_equal_pairs_in_the_order_of_the_pool():
    vec_ND = np.repeat(planted(2, seed=3), 3, axis=0)
    dedup = Dedup("clip", 0.5, clusters=1, iterations=1)
    step = step_of(vec_ND, (3, 5), uids=[7] * 6)
    outcome = dedup.apply(step)
    check(dedup, step, outcome, vec_ND, [7] * 6, list(range(6)))
    assert steps.kept(step, outcome)[0] in (0, 3)


@pytest.mark.parametrize("bucket_rows", [1, 7, 25, 1000])
@pytest.mark.parametrize("rule", ["official", "greedy"])
def test_buckets_change_nothing_even_where_a_cluster_is_larger(bucket_rows, rule):
    vec_ND = planted(80, seed=4)
    dedup = Dedup("clip", 0.02, clusters=6, rule=rule, iterations=5)
    step = step_of(vec_ND, (30, 55), group_units=2)
    clusters = Clustering(6, 100, 5, 0).fit(step, "clip")
    answers = {}
    for rows in (bucket_rows, 10**6):
        compared = dedup.compare(step, clusters, rows)
        table = [step.run.rows(part).table().sort_by("at").to_pylist() for part in compared.parts]
        answers[rows] = table
        if rows == 1:
            assert len(compared.parts[0].files) == len(
                set(steps.table_of(step, clusters.assigned).column("cluster").to_pylist())
            )
    assert len(answers[bucket_rows]) == 2
    assert answers[bucket_rows] == answers[10**6]


@pytest.mark.parametrize("size", [1, 300, 500])
def test_a_group_goes_to_its_clusters_in_tables_of_any_size(size):
    vec_ND, gone = planted(90, seed=6), (0, 19, 34, 35, 70)
    step = step_of(vec_ND, (20, 20, 35, 60, 61), group_units=4, uids=[7] * 90, problem=gone)
    found, groups = Clustering(3, 100, 5, 0).fit(step, "clip"), len(step.state)
    buckets = step.run.map(Buckets(3, 1), found.sizes.grouped(groups))["buckets"]
    given = (step.vectors["clip"], step.samples, found.assigned, step.places, buckets.spread(groups))
    sent = {}
    for table_bytes in (size, 10**6):
        parts = step.run.map(Scatter("image", 3, table_bytes), *given)["rows"].shuffled(3).parts
        pieces = [list(step.run.rows(part).pieces()) for part in parts]
        sent[table_bytes] = [pa.concat_tables(tables).to_pylist() for tables in pieces], sum(map(len, pieces))
    assert sent[size][0] == sent[10**6][0] and sent[size][1] > sent[10**6][1]
    rows = {(row["unit"], row["row"]): row["vector"] for bucket in sent[size][0] for row in bucket}
    starts = np.array([0, 20, 20, 35, 60, 61])
    assert {starts[unit] + row: vector for (unit, row), vector in rows.items()} == {
        n: vec_ND[n].tobytes() for n in range(90) if n not in gone
    }


def test_the_same_answers_serve_every_epsilon():
    step = step_of(planted(50, seed=5), (20,))
    Dedup("clip", 0.02, clusters=2, iterations=3).apply(step)
    step.run.times.clear()
    kept = [len(steps.kept(step, Dedup("clip", e, clusters=2, iterations=3).apply(step))) for e in (0, 0.01, 0.1, 2)]
    assert kept == sorted(kept, reverse=True) and kept[0] > kept[-1] == 2
    assert {entry["stage"] for entry in step.run.times} == {"dedup_drop"}


def test_a_cosine_at_the_bound_is_kept():
    vec_ND = np.array([[1, 0], [0.5, 0.8662], [-1, 0]], np.float16)
    cos = vectors.row_cosine(vec_ND[:1], vec_ND[1:2])[0]
    step = step_of(vec_ND, uids=[1, 2, 3])
    at = 1 - float(cos)
    assert 1 - at == float(cos)
    assert len(steps.kept(step, Dedup("clip", at, clusters=1).apply(step))) == 3
    assert len(steps.kept(step, Dedup("clip", at + 1e-9, clusters=1).apply(step))) == 2


def test_auto_clusters_are_one_for_each_8000_survivors():
    step = step_of(planted(20, seed=6))
    outcome = Dedup("clip", 0.02).apply(step)
    assert outcome.health["clusters"] == 1
    rows = 8001
    few = step_of(np.tile(planted(4, seed=7), (rows // 4 + 1, 1))[:rows])
    assert Dedup("clip", 0.02, iterations=1).apply(few).health["clusters"] == 2


def test_without_survivors_nothing_is_compared():
    step = step_of(planted(3), problem=[0, 1, 2])
    outcome = Dedup("clip", 0.02).apply(step)
    assert outcome.assign.num_rows == 0
    assert steps.kept(step, outcome) == []
