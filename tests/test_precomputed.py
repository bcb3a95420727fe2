import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.arrow import unfixed
from pipeline.errors import UserError
from pipeline.formats import datacomp
from pipeline.machine import Machine
from pipeline.precomputed import Precomputed, find_dims
from pipeline.schema import embeddings
from pipeline.storage import UnitFiles
from tests import pools, steps


class Committed:
    """The rows of one part, at hand."""

    def __init__(self, table):
        self._table = table

    def table(self, columns=None):
        return self._table.select(columns) if columns else self._table


def unit(folder, captions, **arrays):
    uids = [f"{i:032x}" for i in range(len(captions))]
    pq.write_table(pa.table({"uid": uids, "text": captions}), folder / "x.parquet")
    paths = {"sidecar": folder / "x.parquet"}
    if arrays:
        np.savez(folder / "x.npz", **arrays)
        paths["npz"] = folder / "x.npz"
    return UnitFiles(pools.unit_of(**paths), Machine())


def embed(files, image="img", text="txt", dims=2):
    samples = datacomp.read(files).samples
    return Precomputed(image, text, "datacomp", dims).build(Machine())(files, Committed(samples))


def test_vectors_worked_by_hand(tmp_path):
    image = np.array([[3, 4], [0, 0], [1, 0], [0, 0], [0, 2]], np.float32)
    text = np.array([[0, 5], [1, 0], [np.inf, 0], [1, 0], [0, -7]], np.float32)
    made = embed(unit(tmp_path, ["a", "b", "c", "", "e"], img=image, txt=text))
    table = steps.evidence(made)
    assert table.schema == embeddings(2)
    assert unfixed(table["image"], np.float16).tolist() == [
        [np.float16(0.6), np.float16(0.8)],
        [0, 0],
        [0, 0],
        [0, 0],
        [0, 1],
    ]
    assert table["image"].is_valid().to_pylist() == [True, False, False, False, True]
    assert table["text"].is_valid().to_pylist() == [True, False, False, False, True]
    score = table["score"].to_pylist()
    assert score[1:] == [None, None, None, -1.0]
    assert score[0] == pytest.approx(0.8, abs=1e-3)
    assert table["problem"].to_pylist() == [None, "bad_vector", "bad_vector", None, None]
    assert table["detail"].to_pylist() == [
        None,
        "img: not finite, or zero",
        "txt: not finite, or zero",
        None,
        None,
    ]
    assert made.facts == {"rows": 5, "embedded": 2, "dims": 2}


def test_without_a_text_array_there_is_no_score(tmp_path):
    made = embed(unit(tmp_path, ["a", "b"], img=np.eye(2)), text=None)
    table = steps.evidence(made)
    assert table["image"].null_count == 0
    assert table["text"].null_count == table["score"].null_count == table["problem"].null_count == 2
    assert made.facts["embedded"] == 2


@pytest.mark.parametrize(
    ("arrays", "detail"),
    [
        ({}, "img: no .npz beside the metadata"),
        ({"img": np.eye(3, 2), "txt": np.eye(2)}, "img: 3 vectors for 2 rows of metadata"),
        ({"img": np.eye(2), "txt": np.eye(2, 5)}, "txt: 5 dimensions, 2 in other files"),
    ],
)
def test_a_unit_without_usable_arrays_keeps_its_rows_and_schema(tmp_path, arrays, detail):
    made = embed(unit(tmp_path, ["a", "b"], **arrays))
    table = steps.evidence(made)
    assert table.schema == embeddings(2)
    assert table["problem"].to_pylist() == ["bad_vector"] * 2
    assert table["detail"].to_pylist() == [detail] * 2
    assert table["image"].null_count == table["text"].null_count == 2


def test_a_unit_without_rows_makes_an_empty_table(tmp_path):
    files = unit(tmp_path, [], img=np.empty((0, 2)), txt=np.empty((0, 2)))
    assert steps.evidence(embed(files)).schema == embeddings(2)
    assert embed(files).facts == {"rows": 0, "embedded": 0, "dims": 2}


def test_an_array_of_another_name_is_the_user_s_mistake(tmp_path):
    with pytest.raises(UserError, match=r"no array 'l14' in the pool's \.npz files; they have: img"):
        find_dims("datacomp", "l14", None, [unit(tmp_path, ["a"], img=np.eye(1))])


def test_a_unit_without_the_array_that_others_have_is_damaged(tmp_path):
    table = steps.evidence(embed(unit(tmp_path, ["a"], txt=np.ones((1, 2)))))
    assert table["problem"].to_pylist() == ["bad_vector"]
    assert "no array 'img'" in table["detail"][0].as_py()


def test_dims_come_from_the_first_unit_with_usable_arrays(tmp_path):
    units = []
    for i, arrays in enumerate(({}, {"img": np.ones((1, 7)), "txt": np.ones((1, 7)), "odd": np.ones((1, 6))})):
        (tmp_path / str(i)).mkdir()
        units.append(unit(tmp_path / str(i), ["a"], **arrays))
    assert find_dims("datacomp", "img", "txt", units) == 7
    assert find_dims("datacomp", "odd", None, units) == 6
    with pytest.raises(UserError, match="models: img has 7 dimensions, odd has 6"):
        find_dims("datacomp", "img", "odd", units)
    with pytest.raises(UserError, match="no file of the pool has a usable array img or txt"):
        find_dims("datacomp", "img", "txt", units[:1])
    with pytest.raises(UserError, match="only datacomp and clip_retrieval pools bring arrays of vectors, not parquet"):
        find_dims("parquet", "img", None, units)


def test_the_generated_pool_is_embedded_but_for_what_was_planted(tmp_path):
    pools.datacomp_pool(tmp_path, shards=1, rows=25, seed=2)
    metadata = next(tmp_path.glob("*.parquet"))
    files = UnitFiles(pools.unit_of(sidecar=metadata, npz=metadata.with_suffix(".npz")), Machine())
    samples = datacomp.read(files)
    made = embed(files, "l14_img", "l14_txt", 32)
    assert made.facts == {"rows": 24, "embedded": 21, "dims": 32}
    details = [detail for detail in steps.evidence(made)["detail"].to_pylist() if detail]
    assert details == ["l14_img: not finite, or zero", "l14_txt: not finite, or zero"]
    given = np.array(samples.columns["clip_l14_similarity_score"])
    score = steps.evidence(made)["score"].to_numpy()
    there = ~np.isnan(score)
    assert there.sum() == 21
    np.testing.assert_allclose(score[there], given[there], atol=2e-3)
