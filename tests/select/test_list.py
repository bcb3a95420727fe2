"""list: denied or not allowed by uid, url, sha256 or key; lists of every kind, wherever they lie."""

import hashlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import UserError
from pipeline.machine import Machine
from pipeline.run import stage_key
from pipeline.select.judge import Judge
from pipeline.select.list import List, Listed, among, fingerprints
from tests import steps

WORD = st.sampled_from([0, 1, 2, 2**64 - 1])
UIDS = [f"{n:032x}" for n in (1, 2, 0xAB << 120)]
ROWS = [
    {"uid": bytes.fromhex(uid), "key": key, "url": url, "sha256": sha}
    for uid, key, url, sha in zip(
        UIDS, ["k1", "K2", "k3"], ["http://a/x", "http://a/X", None], ["aa" * 32, "bb" * 32, None], strict=True
    )
]


def reasons(rule):
    samples = steps.samples_of(*ROWS)
    return rule.build(Machine())(samples, pa.table({"none": pa.nulls(3)})).reason.to_pylist()


def text(path, *lines):
    path.write_text("".join(f"{line}\n" for line in lines))
    return str(path)


def test_denied_and_not_allowed_are_complements(tmp_path):
    url = text(tmp_path / "l.txt", UIDS[1], "f" * 32)
    assert reasons(List(deny=url)) == [None, "denied", None]
    assert reasons(List(allow=url)) == ["not_allowed", None, "not_allowed"]


@pytest.mark.parametrize(
    ("on", "line", "row"),
    [
        ("uid", UIDS[2].upper(), 2),
        ("sha256", "BB" * 32, 1),
        ("url", "http://a/X", 1),
        ("url", "http://a/x", 0),
        ("key", "k1", 0),
        ("key", "K2", 1),
        ("key", "k2", None),
        ("url", "HTTP://a/x", None),
    ],
)
def test_digests_match_in_any_case_and_names_only_in_their_own(tmp_path, on, line, row):
    url = text(tmp_path / "l.txt", f"  {line} ", "", "other")
    assert [n for n, reason in enumerate(reasons(List(deny=url, on=on))) if reason] == ([] if row is None else [row])


def test_a_parquet_list_has_the_column_and_null_is_nobody(tmp_path):
    pq.write_table(pa.table({"url": ["http://a/x", None], "uid": ["x", "y"]}), tmp_path / "l.parquet")
    url = str(tmp_path / "l.parquet")
    assert reasons(List(deny=url, on="url")) == ["denied", None, None]
    assert reasons(List(allow=url, on="url")) == [None, "not_allowed", "not_allowed"]
    with pytest.raises(UserError, match=r"list: .*l\.parquet: no column 'key'; it has \['url', 'uid'\]"):
        List(deny=url, on="key").build(Machine())


def test_a_datacomp_subset_is_a_list_of_uids(tmp_path):
    pairs = [(int(uid[:16], 16), int(uid[16:], 16)) for uid in (UIDS[2], UIDS[0])]
    np.save(tmp_path / "s.npy", np.array(pairs, "u8,u8"))
    assert reasons(List(allow=str(tmp_path / "s.npy"))) == [None, "not_allowed", None]
    with pytest.raises(UserError, match=r"holds u8,u8 uids .* and needs `on: uid`"):
        List(allow=str(tmp_path / "s.npy"), on="key").build(Machine())
    np.save(tmp_path / "f.npy", np.zeros(3))
    with pytest.raises(UserError, match=r"f\.npy: a \.npy list holds u8,u8 uids \(found float64\)"):
        List(allow=str(tmp_path / "f.npy")).build(Machine())


def test_an_empty_list_denies_nobody_and_allows_nobody(tmp_path):
    url = text(tmp_path / "l.txt")
    assert reasons(List(deny=url)) == [None] * 3
    assert reasons(List(allow=url)) == ["not_allowed"] * 3


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("l.npy", b""),
        ("l.npy", b"\x93NUMPY nothing"),
        ("l.npy", b"PK\x03\x04"),
        ("l.parquet", b"PAR1"),
        ("l.txt", b"\xff\xfe\x00"),
    ],
)
def test_a_damaged_list_is_named(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=rf"list: .*{name}: cannot be read: "):
        List(deny=str(tmp_path / name)).build(Machine())


def test_an_array_of_objects_is_refused(tmp_path):
    np.save(tmp_path / "l.npy", np.array([{"a": 1}]), allow_pickle=True)
    with pytest.raises(UserError, match="cannot be read"):
        List(deny=str(tmp_path / "l.npy")).build(Machine())


def test_a_list_that_is_not_there_is_named(tmp_path):
    for use in (lambda r: r.pinned(Machine()), lambda r: r.build(Machine())):
        with pytest.raises(UserError, match=r"list: .*/none\.txt cannot be read: No such file"):
            use(List(deny=str(tmp_path / "none.txt")))
    with pytest.raises(UserError, match="only these are read and written"):
        List(deny="ftp://host/x.txt").pinned(Machine())


def test_a_list_is_known_by_its_content(tmp_path):
    here, there, other = (text(tmp_path / n, line) for n, line in (("a.txt", "x"), ("b.txt", "x"), ("c.txt", "y")))

    def key(rule):
        return stage_key(Judge(1, rule.pinned(Machine())))

    digest = hashlib.sha256(b"x\n").hexdigest()
    assert List(deny=here).pinned(Machine()).sha256 == digest
    assert key(List(deny=here)) == key(List(deny=there)) == key(List(deny=here, sha256=digest))
    others = [List(deny=other), List(allow=here), List(deny=here, on="key")]
    assert len({key(List(deny=here)), *map(key, others)}) == 4


def test_a_list_that_changed_is_refused(tmp_path):
    url = text(tmp_path / "a.txt", "x")
    with pytest.raises(UserError, match=rf"list: {url} has sha256 [0-9a-f]{{64}}, the recipe says 00"):
        List(deny=url, sha256="00" * 32).pinned(Machine())


@pytest.mark.parametrize("names", [{}, {"deny": "a", "allow": "b"}])
def test_a_list_needs_one_of_deny_and_allow(names):
    with pytest.raises(ValueError, match="list needs one of deny and allow"):
        List(**names)


def test_fingerprints_are_one_for_each_text():
    texts = [None, "", "a", "A", *map(str, range(3000))]
    for on, different in (("url", len(texts)), ("sha256", len(texts) - 1)):
        high, low = fingerprints(texts, on)
        assert high.dtype == low.dtype == np.uint64 and len(high) == len(low) == len(texts)
        assert len(set(zip(high.tolist(), low.tolist(), strict=True))) == different


@given(st.lists(st.tuples(WORD, WORD)), st.lists(st.tuples(WORD, WORD)))
def test_members_are_found_also_where_words_share_their_first_half(values, listed):
    def words(pairs):
        return tuple(np.array([pair[side] for pair in pairs], np.uint64) for side in (0, 1))

    assert among(words(values), Listed.of(words(listed))).tolist() == [value in listed for value in values]


@pytest.mark.parametrize("step", [1, 2**40, 2**52 + 3])
def test_members_are_found_also_where_all_have_one_prefix(step):
    listed = np.arange(0, 3000, 3, dtype=np.uint64) * np.uint64(step)
    values = np.arange(3000, dtype=np.uint64) * np.uint64(step)
    found = among((values, np.zeros_like(values)), Listed.of((listed[::-1], np.zeros_like(listed))))
    assert np.flatnonzero(found).tolist() == list(range(0, 3000, 3))


def test_what_is_no_uid_names_nobody(tmp_path):
    url = text(tmp_path / "l.txt", "ab", UIDS[1] + "00", UIDS[1][:-1] + "g", UIDS[0])
    assert reasons(List(deny=url)) == ["denied", None, None]


def test_the_step_drops_what_the_list_names_among_the_survivors(tmp_path):
    rows = [dict(ROWS[0]), dict(ROWS[1]), dict(ROWS[0], problem="bad_metadata")]
    step = steps.step_of(steps.memory_run(), [steps.samples_of(*rows)])
    outcome = List(deny=text(tmp_path / "l.txt", UIDS[0])).apply(step)
    assert [v[0] for v in steps.verdicts(step, outcome)] == ["denied", None, "earlier"]
    assert next(outcome.state.facts())["overlap"] == {}
