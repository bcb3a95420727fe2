import hashlib
import io
import json
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import UserError
from pipeline.formats import datacomp
from pipeline.formats.metadata import MetadataError
from pipeline.machine import Machine
from pipeline.schema import SAMPLES
from pipeline.storage import UnitFiles
from tests import pools

A, B, C = "a" * 32, "b" * 32, "c" * 32


def files(folder, metadata, tar=None, **arrays):
    pq.write_table(pa.table(metadata), folder / "x.parquet")
    paths = {"sidecar": folder / "x.parquet"}
    if arrays:
        np.savez(folder / "x.npz", **arrays)
        paths["npz"] = folder / "x.npz"
    if tar is not None:
        with tarfile.open(folder / "x.tar", "w", format=tarfile.USTAR_FORMAT) as file:
            for name, data in tar.items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                file.addfile(member, io.BytesIO(data))
        paths["tar"] = folder / "x.tar"
    return UnitFiles(pools.unit_of(**paths), Machine())


def test_metadata_worked_by_hand(tmp_path):
    reading = datacomp.read(
        files(
            tmp_path,
            {
                "uid": [A.upper(), "short", None, C, B],
                "url": ["u0", "u1", None, "u3", "u4"],
                "text": ["t0", "t1", "t2", "t3", " "],
                "original_width": [640, 1, 2, 3, None],
                "original_height": [480, 1, 2, 3, 4],
                "status": ["success", "success", None, "failed_to_download", "success"],
                "score": [0.5, 0.25, 0.1, 0.2, 0.3],
            },
        )
    )
    assert reading.samples.schema == SAMPLES
    assert [uid.hex() for uid in reading.samples["uid"].to_pylist()] == [
        A,
        hashlib.sha256(b"u1\0t1").hexdigest()[:32],
        hashlib.sha256(b"2\0t2").hexdigest()[:32],
        B,
    ]
    assert reading.samples["key"].to_pylist() == [A, "1", "2", B]
    assert reading.samples["problem"].to_pylist() == [None, None, None, "missing_caption"]
    assert reading.samples["source_row"].to_pylist() == [0, 1, 2, 4]
    assert reading.samples["original_width"].to_pylist() == [640, 1, 2, None]
    assert reading.samples["image"].null_count == 4
    assert reading.columns["score"].to_pylist() == [0.5, 0.25, 0.1, 0.3]
    assert reading.problems.to_pylist() == [{"key": B, "offset": None, "reason": "missing_caption", "detail": None}]


def test_the_key_column_serves_where_there_is_no_uid(tmp_path):
    reading = datacomp.read(files(tmp_path, {"key": ["k", None, "k"], "text": ["a", "b", "c"]}))
    assert reading.samples["key"].to_pylist() == ["k", "1", "k"]
    assert reading.samples["problem"].to_pylist() == [None, None, "duplicate_key"]


def test_vectors_follow_the_samples_and_only_the_named_array_is_read(tmp_path):
    unit = files(tmp_path, {"uid": [A, B, C], "text": ["x", "y", "z"]}, img=np.arange(6.0).reshape(3, 2), junk=[{}])
    samples = datacomp.read(unit).samples
    assert datacomp.vectors(unit, "img", samples).tolist() == [[0, 1], [2, 3], [4, 5]]
    assert datacomp.vectors(unit, "img", samples.take([2, 0])).tolist() == [[4, 5], [0, 1]]
    assert datacomp.vectors(unit, "img", samples.slice(0, 0)).shape == (0, 2)


def test_an_array_that_does_not_exist_is_named_with_those_that_do(tmp_path):
    unit = files(tmp_path, {"uid": [A]}, l14_img=np.ones((1, 2)), l14_txt=np.ones((1, 2)))
    with pytest.raises(UserError, match=r"no array 'b32_img' .* they have: l14_img, l14_txt"):
        datacomp.vectors(unit, "b32_img", SAMPLES.empty_table())


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.ones((3, 2)), "3 vectors for 2 rows of metadata"),
        (np.ones(2), "an array of vectors expected, found shape"),
        (np.ones((2, 2), np.int64), "an array of vectors expected"),
        (np.array([[{}, {}], [{}, {}]]), "an array of vectors expected"),
        (np.ones((2, 0)), "an array of vectors expected"),
    ],
)
def test_arrays_that_are_no_vectors_of_the_rows_are_refused(tmp_path, array, reason):
    unit = files(tmp_path, {"uid": [A, B]}, img=array)
    with pytest.raises(MetadataError, match=reason):
        datacomp.vectors(unit, "img", SAMPLES.empty_table())


def test_damaged_npz_files_are_named_not_raised(tmp_path):
    unit = files(tmp_path, {"uid": [A, B]}, img=np.random.default_rng(0).normal(size=(2, 500)))
    data = (tmp_path / "x.npz").read_bytes()
    flipped = bytearray(data)
    flipped[4000] ^= 1
    for damaged in (b"", b"<html>", data[:-30], data[:2000] + data[2100:], bytes(flipped)):
        (tmp_path / "x.npz").write_bytes(damaged)
        fresh = UnitFiles(pools.unit_of(sidecar=tmp_path / "x.parquet", npz=tmp_path / "x.npz"), Machine())
        with pytest.raises(MetadataError, match="damaged array"):
            datacomp.vectors(fresh, "img", SAMPLES.empty_table())
    assert unit is not None


def test_a_unit_without_npz_says_so(tmp_path):
    with pytest.raises(MetadataError, match=r"no \.npz beside the metadata"):
        datacomp.vectors(files(tmp_path, {"uid": [A]}), "img", SAMPLES.empty_table())


def test_damaged_metadata_is_a_line_of_problems(tmp_path):
    unit = files(tmp_path, {"uid": [A]})
    (tmp_path / "x.parquet").write_bytes(b"no parquet at all" * 20)
    reading = datacomp.read(UnitFiles(pools.unit_of(sidecar=tmp_path / "x.parquet"), Machine()))
    assert len(reading.samples) == len(reading.columns) == 0
    assert reading.problems.to_pylist() == [
        {"key": None, "offset": None, "reason": "bad_metadata", "detail": "not a parquet file, or cut short"}
    ]
    assert "npz" not in unit


def test_metadata_without_rows_is_an_empty_shard(tmp_path):
    reading = datacomp.read(files(tmp_path, {"uid": pa.array([], pa.string())}))
    assert reading.problems["reason"].to_pylist() == ["empty"]


def test_a_pool_without_tars_has_no_images_and_misses_none(tmp_path):
    unit = files(tmp_path, {"uid": [A, B], "text": ["x", "y"]})
    assert list(datacomp.images(unit, datacomp.read(unit).samples)) == [None, None]


def test_a_tar_is_joined_by_the_key_column(tmp_path):
    tar = {"k1.jpg": b"one", "k1.txt": b"c1", "k0.jpg": b"zero", "k0.txt": b"c0"}
    unit = files(tmp_path, {"uid": [A, B, C], "key": ["k0", "k1", "k2"], "text": ["x", "y", "z"]}, tar, img=np.eye(3))
    samples = datacomp.read(unit).samples
    assert samples["key"].to_pylist() == ["k1", "k0", "k2"]
    assert [uid.hex() for uid in samples["uid"].to_pylist()] == [B, A, C]
    assert samples["problem"].to_pylist() == [None, None, "missing_image"]
    assert list(datacomp.images(unit, samples)) == [b"one", b"zero", None]
    assert datacomp.vectors(unit, "img", samples).argmax(axis=1).tolist() == [1, 0, 2]


def test_without_a_key_column_a_tar_is_joined_by_the_uid_in_its_json(tmp_path):
    tar = {}
    for key, uid in (("k1", B), ("k9", "d" * 32), ("k0", A)):
        tar |= {f"{key}.jpg": key.encode(), f"{key}.txt": b"c", f"{key}.json": json.dumps({"uid": uid}).encode()}
    unit = files(tmp_path, {"uid": [A, B, C], "url": ["u0", "u1", "u2"], "text": ["x", "y", "z"]}, tar, img=np.eye(3))
    reading = datacomp.read(unit)
    samples = reading.samples
    assert samples.schema == SAMPLES
    assert samples["key"].to_pylist() == ["k1", "k9", "k0", C]
    assert samples["problem"].to_pylist() == [None, None, None, "missing_image"]
    assert samples["source_row"].to_pylist() == [1, None, 0, 2]
    assert samples["url"].to_pylist() == ["u1", None, "u0", "u2"]
    assert samples["caption"].to_pylist() == ["c", "c", "c", "z"]
    assert reading.columns["text"].to_pylist() == ["y", None, "x", "z"]
    assert list(datacomp.images(unit, samples)) == [b"k1", b"k9", b"k0", None]
    vec_ND = datacomp.vectors(unit, "img", samples)
    assert vec_ND[[0, 2, 3]].argmax(axis=1).tolist() == [1, 0, 2]
    assert np.isnan(vec_ND[1]).all()


def test_samples_of_one_uid_each_have_a_row_of_their_own(tmp_path):
    tar = {}
    for key, uid in (("k1", A), ("k2", B), ("k3", A), ("k4", A), ("k5", A)):
        tar |= {f"{key}.jpg": key.encode(), f"{key}.txt": b"c", f"{key}.json": json.dumps({"uid": uid}).encode()}
    unit = files(tmp_path, {"uid": [A, A, B, A, B], "text": ["a1", "a2", "b1", "a3", "b2"]}, tar, img=np.eye(5))
    reading = datacomp.read(unit)
    samples = reading.samples
    assert samples["source_row"].to_pylist() == [0, 2, 1, 3, 3, 4]
    assert reading.columns["text"].to_pylist() == ["a1", "b1", "a2", "a3", "a3", "b2"]
    assert samples["problem"].to_pylist() == [None] * 5 + ["missing_image"]
    assert datacomp.vectors(unit, "img", samples).argmax(axis=1).tolist() == [0, 2, 1, 3, 3, 4]


def test_the_generated_pool_has_what_was_planted(tmp_path):
    pools.datacomp_pool(tmp_path, shards=1, rows=25, seed=3)
    metadata = next(tmp_path.glob("*.parquet"))
    unit = UnitFiles(pools.unit_of(sidecar=metadata, npz=metadata.with_suffix(".npz")), Machine())
    samples = datacomp.read(unit).samples
    assert len(samples) == 24
    assert samples["problem"].to_pylist().count("missing_caption") == 1
    image, text = (datacomp.vectors(unit, name, samples) for name in ("l14_img", "l14_txt"))
    assert np.flatnonzero(np.isnan(image).any(axis=1)).tolist() == [5]
    assert np.flatnonzero((text == 0).all(axis=1)).tolist() == [7]
    assert image[9] @ image[10] > 0.99
