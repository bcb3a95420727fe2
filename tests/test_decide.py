"""The written record: decisions, assignments and problems as users read them."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.decide import Decide, ShowAssignment, ShowProblems
from pipeline.errors import SchemaError
from pipeline.machine import Machine
from pipeline.schema import PROBLEMS, STATE
from pipeline.state import dropped_table
from tests import steps
from tests.steps import Told

UID = [bytes([n]) * 16 for n in range(5)]


LABELS = Told(given={"path": "decisions/00000000.parquet", "shards": ["a/0.tar", "b/0.tar"]})
SAMPLES = Told(
    steps.samples_of({"uid": UID[0], "key": "k0"}, {"uid": UID[1], "key": "k1", "problem": "missing_caption"}),
    steps.samples_of({"uid": UID[2], "key": "k0"}, {"uid": UID[3], "key": "k3"}, {"uid": UID[4], "key": "k4"}),
)


STATE_AFTER = Told(pa.table({"dropped_by": pa.array([0, 255, 1, 2, 0], pa.uint8())}, STATE))
DROPPED = [
    Told(dropped_table(1, "missing_caption")),
    Told(dropped_table(1, "denied")),
    Told(dropped_table(1, "duplicate", pa.array([0.97]), 0.93, pa.array([UID[0]], pa.binary(16)))),
]


def written(made, folder):
    """The one file that a stage exports, as written."""
    [(path, write)] = made.exports.items()
    with open(folder / "x.parquet", "wb") as out:
        write(out)
    return path, pq.read_table(folder / "x.parquet")


def decided(tmp_path, stage, columns, *evidence, samples=SAMPLES):
    return written(stage.build(Machine())(samples, columns, STATE_AFTER, LABELS, *DROPPED, *evidence), tmp_path)


def test_every_listed_sample_has_its_row_in_pool_order(tmp_path):
    columns = Told(pa.table({"s": ["0.5", None], "lang": ["en", "de"]}), pa.table({"s": [1, 2, 3]}))
    scores = Told(steps.scores_of(0.5, None), steps.scores_of(0.25, 0.125, None))
    stage = Decide(("01-list", "02-dedup"), ("clip",), (("s", "double"), ("lang", "string")))
    path, table = decided(tmp_path, stage, columns, scores)
    assert path == "decisions/00000000.parquet"
    hexed = [uid.hex() for uid in UID]
    assert table.to_pydict() == {
        "uid": hexed,
        "shard": ["a/0.tar", "a/0.tar", "b/0.tar", "b/0.tar", "b/0.tar"],
        "key": ["k0", "k1", "k0", "k3", "k4"],
        "problem": [None, "missing_caption", None, None, None],
        "kept": [True, False, False, False, True],
        "step": [None, "00-read", "01-list", "02-dedup", None],
        "reason": [None, "missing_caption", "denied", "duplicate", None],
        "value": [None, None, None, 0.97, None],
        "threshold": [None, None, None, 0.93, None],
        "duplicate_of": [None, None, None, hexed[0], None],
        "score_clip": [0.5, None, 0.25, 0.125, None],
        "s": [0.5, None, 1.0, 2.0, 3.0],
        "lang": ["en", "de", None, None, None],
    }
    kinds = {field.name: str(field.type) for field in table.schema}
    assert (kinds["score_clip"], kinds["s"], kinds["lang"], kinds["value"]) == ("float", "double", "string", "double")
    assert kinds["kept"] == "bool" and kinds["duplicate_of"] == "string"


def test_a_row_too_few_is_noticed(tmp_path):
    with pytest.raises(SchemaError, match="2 samples listed, 5 decided"):
        decided(tmp_path, Decide((), (), ()), Told(), samples=Told(SAMPLES.tables[0]))


def test_an_assignment_by_uid_shard_and_key(tmp_path):
    assign = {
        "at": pa.array([0, 3], pa.uint32()),
        "cluster": pa.array([7, 0], pa.int32()),
        "distance": pa.array([0.5, 0.25], pa.float32()),
    }
    more = {"max_cosine": pa.array([-1, 0.75], pa.float32()), "duplicate_of": pa.array([None, UID[0]], pa.binary(16))}
    expected = {
        "uid": [UID[0].hex(), UID[3].hex()],
        "shard": ["a/0.tar", "b/0.tar"],
        "key": ["k0", "k3"],
        "cluster": [7, 0],
        "distance": [0.5, 0.25],
    }
    show = ShowAssignment().build(Machine())
    assert written(show(Told(pa.table(assign)), SAMPLES, LABELS), tmp_path)[1].to_pydict() == expected
    both = written(show(Told(pa.table(assign | more)), SAMPLES, LABELS), tmp_path)[1].to_pydict()
    assert both == expected | {"max_cosine": [-1, 0.75], "duplicate_of": [None, UID[0].hex()]}


def problems(*rows):
    return pa.Table.from_pylist([dict(zip(PROBLEMS.names, row, strict=True)) for row in rows], schema=PROBLEMS)


def test_problems_of_reading_then_those_that_the_models_found(tmp_path):
    read = Told(problems(("k1", 512, "missing_caption", "none"), (None, 9, "truncated", "cut")), problems())
    first = [steps.scores_of(None, None), steps.scores_of(None, None, None)]
    second = list(first)
    first[1] = (
        first[1]
        .set_column(3, "problem", pa.array([None, "unreadable_image", None]))
        .set_column(4, "detail", pa.array([None, "noise", None]))
    )
    second[1] = second[1].set_column(3, "problem", pa.array([None, "bad_vector", "bad_vector"]))
    stage = ShowProblems().build(Machine())
    _, table = written(stage(read, SAMPLES, LABELS, Told(*first), Told(*second)), tmp_path)
    assert [tuple(row.values()) for row in table.to_pylist()] == [
        ("a/0.tar", "k1", 512, "missing_caption", "none"),
        ("a/0.tar", None, 9, "truncated", "cut"),
        ("b/0.tar", "k3", None, "unreadable_image", "noise"),
        ("b/0.tar", "k4", None, "bad_vector", None),
    ]
    assert table.column_names == ["shard", *PROBLEMS.names]
    _, table = written(stage(read, SAMPLES, LABELS), tmp_path)
    assert table.num_rows == 2
