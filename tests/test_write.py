"""Filtered shards: the pool's bytes under their keys, in pool order, in as many shards as asked for."""

import gzip
import io
import json
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.curate import curate, folder_prefixes
from pipeline.errors import UserError
from pipeline.executor import Serial
from pipeline.machine import Machine
from pipeline.recipe import recipe_of
from pipeline.run import Run
from pipeline.storage import Root
from pipeline.write import GAP_BYTES, SortUids, Span, member_bytes, spans, unique_keys
from tests import pools
from tests.steps import Told

SCORE = "column:score"


def tar_bytes(members):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for number, (name, data) in enumerate(members.items()):
            info = tarfile.TarInfo(name)
            info.size, info.mtime, info.uid, info.mode = len(data), 1_600_000_000 + number, 1000, 0o755
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def sample(key, score, extra=()):
    """Members of one sample; sizes are no multiples of a block."""
    fields = {"key": key, "score": score, "n": [1, 2], "ä": "ß"}
    image = pools.jpeg(pools.planted(0, 2, 1), 1) + b"\0" * (int(score * 1000) % 700)
    parts = {"jpg": image, "txt": f"caption of {key}".encode(), "json": json.dumps(fields).encode(), **dict(extra)}
    return {f"{key}.{suffix}": data for suffix, data in parts.items()}


def pool(folder, shards, gz=False):
    """Tars by name -> scores of their samples, whose keys begin anew in each shard where `shards` says so."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, samples in shards.items():
        members = {}
        for key, score in samples:
            members |= sample(
                key, score, extra=[("cls", b"7"), ("meta.json", b'{"a": 1}')] if key.endswith("3") else ()
            )
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        data = tar_bytes(members)
        (folder / name).write_bytes(gzip.compress(data) if gz else data)
    return folder


def run_recipe(tmp_path, path, select, format="webdataset", group_units=2, **write):
    plain = {"pool": {"format": format, "path": str(path)}, "select": select, "write": write}
    run = Run(Root(f"memory://{tmp_path}/store"), Root(str(tmp_path / "run")), Serial(), Machine())
    return curate(run, recipe_of(plain), group_units=group_units)


def members(path):
    with tarfile.open(path, "r:*") as tar:
        return [(m.name, tar.extractfile(m).read()) for m in tar]


def filtered(tmp_path):
    """[[(name, data)] of each output tar], checked against its sidecar and stats."""
    out = sorted((tmp_path / "run/filtered").glob("*.tar"))
    assert [p.name for p in out] == [f"{n:08d}.tar" for n in range(len(out))]
    for path in out:
        keys = list(dict.fromkeys(name.partition(".")[0] for name, _ in members(path)))
        assert pq.read_table(path.with_suffix(".parquet")).column("key").to_pylist() == keys
        stats = json.loads(path.with_name(f"{path.stem}_stats.json").read_text())
        assert stats["count"] == stats["successes"] == len(keys) == stats["status_dict"]["success"]
    return [members(path) for path in out]


def keep_from(score):
    return [{"cut": {"score": SCORE, "min": score}}]


SHARDS = {
    "00000.tar": [(f"a{n}", n / 10) for n in range(6)],
    "00001.tar": [(f"b{n}", n / 100) for n in range(3)],  # none is kept
    "00002.tar": [(f"c{n}", 1 - n / 10) for n in range(5)],
}


@pytest.mark.parametrize(("rows", "gz"), [(1, False), (2, True), (3, False), (5, False), (100, True)])
def test_members_are_copied_byte_for_byte_in_pool_order(tmp_path, rows, gz):
    shards = {name + ".gz" * gz: samples for name, samples in SHARDS.items()}
    folder = pool(tmp_path / "pool", shards, gz)
    assert run_recipe(tmp_path, folder, keep_from(0.2), samples_per_shard=rows).kept == 9
    found = filtered(tmp_path)
    kept = {f"a{n}" for n in range(2, 6)} | {f"c{n}" for n in range(5)}
    expected = [m for name in sorted(shards) for m in members(folder / name) if m[0].partition(".")[0] in kept]
    assert [m for tar in found for m in tar] == expected
    assert [len({n.partition(".")[0] for n, _ in tar}) for tar in found] == [rows] * (9 // rows) + [9 % rows] * (
        9 % rows > 0
    )
    for path in (tmp_path / "run/filtered").glob("*.tar"):
        with tarfile.open(path) as tar:
            assert {(m.mtime, m.uid, m.gid, m.mode, m.uname) for m in tar} == {(0, 0, 0, 0o644, "")}
        assert path.stat().st_size % 512 == 0 and path.read_bytes().endswith(b"\0" * 1024)


def test_the_parquet_and_the_subset_hold_the_same_rows(tmp_path):
    folder = pool(tmp_path / "pool", SHARDS)
    run_recipe(tmp_path, folder, keep_from(0.2), samples_per_shard=4, images=True)
    parts = [pq.read_table(path) for path in sorted((tmp_path / "run/parquet").glob("*.parquet"))]
    assert [p.num_rows for p in parts] == [4, 4, 1]
    table = pa.concat_tables(parts)
    assert table.column("key").to_pylist() == ["a2", "a3", "a4", "a5", "c0", "c1", "c2", "c3", "c4"]
    assert table.column("shard").to_pylist() == ["00000.tar"] * 4 + ["00002.tar"] * 5
    assert table.column("caption").to_pylist() == [f"caption of {key}" for key in table.column("key").to_pylist()]
    images = [data for tar in filtered(tmp_path) for name, data in tar if name.endswith(".jpg")]
    assert table.column("image").to_pylist() == images
    assert table.column("score").to_pylist() == pytest.approx([0.2, 0.3, 0.4, 0.5, 1, 0.9, 0.8, 0.7, 0.6])
    subset = np.load(tmp_path / "run/subset.npy", allow_pickle=False)
    assert subset.dtype == np.dtype("u8,u8")
    assert [f"{a:016x}{b:016x}" for a, b in subset.tolist()] == sorted(table.column("uid").to_pylist())


def test_metadata_named_as_our_own_columns_gives_way(tmp_path):
    uids = [f"{n:032x}" for n in range(4)]
    (tmp_path / "pool").mkdir()
    table = {"uid": uids, "caption": ["a", "b", "c", "d"], "shard": [1, 2, 3, 4], "other": [9, 8, 7, 6]}
    pq.write_table(pa.table(table), tmp_path / "pool/x.parquet")
    run_recipe(tmp_path, tmp_path / "pool", [], "datacomp")
    found = pq.ParquetFile(tmp_path / "run/parquet/00000000.parquet").read()
    assert found.column_names == ["shard", "key", "uid", "caption", "other"]
    assert found.column("shard").to_pylist() == ["x.parquet"] * 4


def test_zero_kept_rows_leave_one_empty_shard(tmp_path):
    folder = pool(tmp_path / "pool", SHARDS)
    assert run_recipe(tmp_path, folder, keep_from(5)).kept == 0
    assert filtered(tmp_path) == [[]]
    assert pq.read_table(tmp_path / "run/parquet").num_rows == 0
    assert len(np.load(tmp_path / "run/subset.npy", allow_pickle=False)) == 0


def test_equal_pairs_are_once_in_the_subset_and_each_in_the_tars(tmp_path):
    shards = {"00000.tar": [("a", 0.5)], "00001.tar": [("a", 0.5)], "00002.tar": [("b", 0.5)]}
    folder = tmp_path / "pool"
    folder.mkdir()
    image = sample("x", 0.5)["x.jpg"]
    for name, [(key, score)] in shards.items():
        fields = json.dumps({"score": score}).encode()
        (folder / name).write_bytes(tar_bytes({f"{key}.jpg": image, f"{key}.txt": b"same", f"{key}.json": fields}))
    run_recipe(tmp_path, folder, keep_from(0))
    assert len(np.load(tmp_path / "run/subset.npy", allow_pickle=False)) == 1
    decisions = pq.read_table(tmp_path / "run/decisions")
    assert len(set(decisions.column("uid").to_pylist())) == 1 and decisions.num_rows == 3
    # the second `a` of the one output tar is told from the first by its shard
    assert [name for name, _ in filtered(tmp_path)[0][::3]] == ["a.jpg", "00001_a.jpg", "b.jpg"]


def test_keys_of_several_folders_carry_the_folder_s_number(tmp_path):
    folder = pool(
        tmp_path / "pool", {"x/0.tar": [("k", 0.5), ("d/k3", 0.5)], "y/0.tar": [("k", 0.6)], "y/1.tar": [("m", 0.7)]}
    )
    run_recipe(tmp_path, folder, keep_from(0))
    names = [name for name, _ in filtered(tmp_path)[0]]
    assert [names[at] for at in (0, 3, 8, 11)] == ["000_k.jpg", "d/000_k3.jpg", "001_k.jpg", "001_m.jpg"]
    assert pq.read_table(tmp_path / "run/decisions").column("key").to_pylist() == ["k", "d/k3", "k", "m"]


def test_folders_are_numbered_in_pool_order():
    assert folder_prefixes(["0.tar", "1.tar"]) == ["", ""]
    assert folder_prefixes(["b/0.tar", "a/0.tar", "b/1.tar", "2.tar"]) == ["000_", "001_", "000_", "002_"]
    assert folder_prefixes([f"{n}/x.tar" for n in range(1001)])[-1] == "1000_"


def test_annotations_are_added_to_the_json_of_the_key_alone(tmp_path):
    folder = pool(tmp_path / "pool", SHARDS)
    run_recipe(tmp_path, folder, keep_from(0.3), annotate=True)
    uid = {row["key"]: row["uid"] for row in pq.read_table(tmp_path / "run/decisions").to_pylist()}
    before = dict(m for name in SHARDS for m in members(folder / name))
    for name, data in (m for tar in filtered(tmp_path) for m in tar):
        key, _, suffix = name.partition(".")
        if suffix == "json":
            note = {"uid": uid[key], "scores": {}, "cluster": None}
            assert json.loads(data) == json.loads(before[name]) | {"pairsieve": note}
            assert "ß".encode() in data
        else:
            assert data == before[name]


def test_tars_of_a_pool_without_tars_are_refused_before_anything_is_read(tmp_path):
    folder = pools.datacomp_pool(tmp_path / "pool", 1, 3, 0)
    with pytest.raises(UserError, match="webdataset needs a pool of tars; this one allows parquet and subset"):
        run_recipe(tmp_path, folder, [], "datacomp", formats=["webdataset"])
    assert Root(f"memory://{tmp_path}/store").list() == {}


def test_only_the_formats_asked_for_are_written(tmp_path):
    folder = pool(tmp_path / "pool", SHARDS)
    run_recipe(tmp_path, folder, [], formats=["subset"])
    assert (tmp_path / "run/subset.npy").exists()
    assert not (tmp_path / "run/filtered").exists() and not (tmp_path / "run/parquet").exists()


def test_a_member_that_is_neither_sidecar_nor_image_may_change_and_is_copied_anew(tmp_path):
    folder = pool(tmp_path / "pool", {"0.tar": [("a3", 0.5)]})
    run_recipe(tmp_path, folder, [])
    changed = tar_bytes(dict(members(folder / "0.tar")) | {"a3.cls": b"8"})
    (folder / "0.tar").write_bytes(changed)
    run_recipe(tmp_path, folder, [])
    assert dict(filtered(tmp_path)[0])["a3.cls"] == b"8"


@given(st.lists(st.integers(0, 5), min_size=1, max_size=8), st.integers(1, 7))
def test_spans_share_out_every_kept_row_once_and_in_order(kept, rows):
    everything = [(unit, n) for unit, count in enumerate(kept) for n in range(count)]
    taken = []
    found = spans(kept, rows)
    for span in found:
        mine = [row for row in everything if span.first_unit <= row[0] <= span.last_unit]
        taken.append(mine[span.skip : span.skip + span.take])
        assert taken[-1][:1] == [] or taken[-1][0][0] == span.first_unit
        assert taken[-1][-1:] == [] or taken[-1][-1][0] == span.last_unit
    assert [row for part in taken for row in part] == everything
    assert [len(part) for part in taken[:-1]] == [rows] * (len(found) - 1)


def test_spans_by_hand():
    assert spans([0, 3, 0, 2], 2) == [Span(1, 1, 0, 2), Span(1, 3, 2, 2), Span(3, 3, 1, 1)]
    assert spans([0, 0], 5) == [Span(0, 0, 0, 0)]
    assert spans([5], 5) == [Span(0, 0, 0, 5)]


def test_keys_that_meet_in_one_tar_are_told_apart():
    assert unique_keys([["a", "b"], ["a", "c"]], ["0", "1"]) == [["a", "b"], ["1_a", "c"]]
    assert unique_keys([["d/a"], ["d/a"], ["d/a"]], ["0", "1", "2"]) == [["d/a"], ["d/1_a"], ["d/2_a"]]
    assert unique_keys([["a", "1_a"], ["a"]], ["0", "1"]) == [["a", "1_a"], ["1_1_a"]]
    assert unique_keys([["a"], ["a", "1_a"]], ["0", "1"]) == [["a"], ["1_a", "1_1_a"]]


def test_uids_are_sorted_and_once_each_whichever_half_they_differ_in():
    pairs = [(2, 1), (1, 2), (1, 1), (2, 1), (1, 2), (2, 0), (256, 0)]
    uids = [a.to_bytes(8, "big") + b.to_bytes(8, "big") for a, b in pairs]
    made = SortUids().sort(Told(pa.table({"uid": pa.array(uids, pa.binary(16))})))
    assert made.tables["uids"].column("uid").to_pylist() == sorted(set(uids))
    assert made.facts == {"uids": 5}


class Tar:
    """Files of a unit that notes which ranges are read."""

    def __init__(self, data, short=0):
        self.data, self.short, self.asked = data, short, []

    def read(self, role, ranges):
        self.asked += ranges
        return iter([self.data[a : b - self.short] for a, b in ranges])


def test_neighbouring_members_are_read_at_once_and_others_apart():
    data = bytes(range(256)) * 256
    far = 100 + GAP_BYTES
    ranges = [(0, 10), (10, 10), (60, 100), (far, far + 5), (far + 6 + GAP_BYTES, far + 8 + GAP_BYTES), (3, 4)]
    files = Tar(data)
    assert list(member_bytes(files, ranges)) == [data[a:b] for a, b in ranges]
    assert files.asked == [(0, far + 5), ranges[4], (3, 4)]


def test_a_tar_that_is_shorter_than_it_was_stops_the_copy():
    with pytest.raises(OSError, match="9 of 10 bytes at 0: the tar is not as it was read"):
        list(member_bytes(Tar(bytes(20), short=1), [(0, 10)]))
