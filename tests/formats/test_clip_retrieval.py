import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import UserError
from pipeline.formats import clip_retrieval
from pipeline.formats.metadata import MetadataError
from pipeline.formats.rows import uid_of
from pipeline.machine import Machine
from pipeline.pool import Pool, list_units
from pipeline.schema import SAMPLES
from pipeline.storage import UnitFiles
from tests import pools


def files(folder, metadata, **arrays):
    pq.write_table(pa.table(metadata), folder / "metadata_0.parquet")
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    return UnitFiles(
        pools.unit_of(metadata=folder / "metadata_0.parquet", **{n: folder / f"{n}.npy" for n in arrays}), Machine()
    )


def test_rows_worked_by_hand(tmp_path):
    metadata = {
        "image_path": ["000", "001", "002"],
        "caption": ["a", "", "c"],
        "url": ["u", None, None],
        "NSFW": ["UNLIKELY"] * 3,
    }
    reading = clip_retrieval.read(files(tmp_path, metadata))
    assert reading.samples.schema == SAMPLES
    assert reading.samples["key"].to_pylist() == ["000", "001", "002"]
    assert reading.samples["uid"].to_pylist() == [uid_of(b"u", "a"), uid_of(b"001", ""), uid_of(b"002", "c")]
    assert reading.samples["problem"].to_pylist() == [None, "missing_caption", None]
    assert reading.columns.column_names == list(metadata)


@pytest.mark.parametrize("paths", [["7", "7", "8"], ["7", None, "8"], None])
def test_rows_are_numbered_where_image_paths_do_not_tell_them_apart(tmp_path, paths):
    metadata = {"caption": ["a", "b", "c"], "uid": ["a" * 32] * 3} | ({"image_path": paths} if paths else {})
    reading = clip_retrieval.read(files(tmp_path, metadata))
    assert reading.samples["key"].to_pylist() == ["0", "1", "2"]
    assert reading.samples["problem"].null_count == 3


def test_vectors_follow_the_samples(tmp_path):
    unit = files(tmp_path, {"caption": ["a", "b", "c"]}, img_emb=np.eye(3, 4, dtype=np.float16))
    samples = clip_retrieval.read(unit).samples
    found = clip_retrieval.vectors(unit, "img_emb", samples.take([2, 1]))
    assert found.dtype == np.float16
    assert found.argmax(axis=1).tolist() == [2, 1]
    assert list(clip_retrieval.images(unit, samples)) == [None] * 3


def test_an_array_of_another_name_is_refused(tmp_path):
    with pytest.raises(UserError, match="no array 'l14_img' in a clip_retrieval pool; it has: img_emb, text_emb"):
        clip_retrieval.vectors(files(tmp_path, {"caption": ["a"]}), "l14_img", SAMPLES.empty_table())


def test_missing_short_and_pickled_arrays_are_named(tmp_path):
    with pytest.raises(MetadataError, match="no img_emb file of this number"):
        clip_retrieval.vectors(files(tmp_path, {"caption": ["a"]}), "img_emb", SAMPLES.empty_table())
    unit = files(tmp_path, {"caption": ["a"]}, img_emb=np.ones((2, 3)), text_emb=np.array([[{}]], object))
    with pytest.raises(MetadataError, match="2 vectors for 1 rows of metadata"):
        clip_retrieval.vectors(unit, "img_emb", SAMPLES.empty_table())
    with pytest.raises(MetadataError, match="an array of vectors expected"):
        clip_retrieval.vectors(unit, "text_emb", SAMPLES.empty_table())


def test_a_cut_array_is_named(tmp_path):
    files(tmp_path, {"caption": ["a"]}, img_emb=np.ones((1, 300)))
    path = tmp_path / "img_emb.npy"
    for data in (path.read_bytes()[:-1], path.read_bytes()[:50], b""):
        path.write_bytes(data)
        unit = UnitFiles(pools.unit_of(metadata=tmp_path / "metadata_0.parquet", img_emb=path), Machine())
        with pytest.raises(MetadataError, match="damaged array"):
            clip_retrieval.vectors(unit, "img_emb", SAMPLES.empty_table())


def test_the_generated_pool_is_read(tmp_path):
    pools.clip_retrieval_pool(tmp_path, shards=2, rows=15, seed=1)
    units = list_units(Pool(format="clip_retrieval", path=str(tmp_path)), {})
    assert [unit.shard for unit in units] == ["metadata_0000.parquet", "metadata_0001.parquet"]
    for unit in units:
        opened = UnitFiles(unit, Machine())
        samples = clip_retrieval.read(opened).samples
        assert len(samples) == 14
        assert clip_retrieval.vectors(opened, "text_emb", samples).shape == (14, 32)
