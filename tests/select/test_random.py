"""random: the lowest hashes, and no others."""

import hashlib
import itertools

import pytest

from pipeline.select.random import Random
from tests import steps


def hashed(seed, step, uid):
    return int.from_bytes(hashlib.sha256(f"{seed}/{step}/{uid:032x}".encode()).digest()[:8], "big")


@pytest.mark.parametrize(("seed", "name"), [(0, "01-random"), (0, "02-random"), (17, "01-random")])
def test_the_lowest_hashes_of_seed_step_and_uid_are_drawn(seed, name):
    step = steps.step_of(steps.memory_run(), [steps.uids(*range(20))], seed=seed, name=name)
    outcome = Random(keep=0.35).apply(step)
    assert steps.kept(step, outcome) == sorted(sorted(range(20), key=lambda uid: hashed(seed, name, uid))[:7])
    assert set(steps.verdicts(step, outcome)) == {(None, None, None), ("not_drawn", None, None)}


@pytest.mark.parametrize("group_units", [1, 2, 5])
@pytest.mark.parametrize("ends", [(0, 20), (0, 1, 20), (0, 7, 7, 13, 20)])
def test_the_sample_does_not_depend_on_the_partition(ends, group_units):
    parts = [steps.uids(*range(a, b)) for a, b in itertools.pairwise(ends)]
    step = steps.step_of(steps.memory_run(), parts, group_units=group_units, name="01-random")
    expected = sorted(sorted(range(20), key=lambda uid: hashed(0, "01-random", uid))[:6])
    assert steps.kept(step, Random(keep=6).apply(step)) == expected


def test_equal_pairs_are_drawn_in_pool_order():
    step = steps.step_of(steps.memory_run(), [steps.uids(5, 5), steps.uids(5, 5)])
    assert steps.kept(step, Random(keep=3).apply(step)) == [0, 1, 2]


def test_only_survivors_are_drawn_from_but_the_pool_may_be_the_base():
    bad = {"problem": "bad_metadata"}
    rows = steps.samples_of(bad, {}, bad, {}, {}, {})
    step = steps.step_of(steps.memory_run(), [rows])
    assert len(steps.kept(step, Random(keep=0.5).apply(step))) == 2
    outcome = Random(keep=0.5, of="pool").apply(step)
    assert len(steps.kept(step, outcome)) == 3
    assert set(steps.kept(step, outcome)) <= {1, 3, 4, 5}
