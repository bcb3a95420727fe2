import pyarrow as pa
import pytest

from pipeline.errors import SchemaError
from pipeline.formats.reading import Reading
from pipeline.machine import Machine
from pipeline.pool import Pool, list_units
from pipeline.read import Read, check
from pipeline.schema import PROBLEMS, SAMPLES
from pipeline.storage import UnitFiles
from tests import pools

POOLS = {
    "webdataset": pools.webdataset_pool,
    "datacomp": pools.datacomp_pool,
    "clip_retrieval": pools.clip_retrieval_pool,
    "parquet": pools.parquet_pool,
}


@pytest.mark.parametrize("format", POOLS)
def test_every_format_gives_aligned_tables_and_counts_its_problems(tmp_path, format):
    POOLS[format](tmp_path, 2, 15, 1)
    function = Read(format).build(Machine())
    for unit in list_units(Pool(format=format, path=str(tmp_path)), {}):
        made = function(UnitFiles(unit, Machine()))
        assert list(made.tables) == list(Read.outputs)
        assert made.tables["samples"].schema == SAMPLES
        assert made.tables["problems"].schema == PROBLEMS
        assert len(made.tables["samples"]) == len(made.tables["columns"]) == made.facts["rows"]
        expected = {"missing_caption": 1} | ({"missing_image": 1} if format == "parquet" else {})
        assert made.facts == {
            "rows": 15 if format == "parquet" else 14,
            "problems": expected,
            "shard_problems": 0,
            "columns": sorted(made.tables["columns"].column_names),
        }
        assert len(made.tables["problems"]) == sum(expected.values())


def test_pools_of_one_seed_hold_the_same_captions_in_every_format(tmp_path):
    captions = {}
    for format, write in POOLS.items():
        write(tmp_path / format, 1, 9, 7)
        [unit] = list_units(Pool(format=format, path=str(tmp_path / format)), {})
        samples = Read(format).build(Machine())(UnitFiles(unit, Machine())).tables["samples"]
        captions[format] = [caption or "" for caption in samples["caption"].to_pylist()]
    assert len(set(map(tuple, captions.values()))) == 1


def test_damage_of_the_shard_is_counted_apart(tmp_path):
    (tmp_path / "0.parquet").write_bytes(b"nothing")
    [unit] = list_units(Pool(format="datacomp", path=str(tmp_path)), {})
    made = Read("datacomp").build(Machine())(UnitFiles(unit, Machine()))
    assert made.facts == {"rows": 0, "problems": {}, "shard_problems": 1, "columns": []}


def sample(**values):
    row = dict.fromkeys(SAMPLES.names) | {"uid": b"x" * 16, "key": "k"} | values
    return pa.Table.from_pylist([row], schema=SAMPLES)


@pytest.mark.parametrize(
    ("samples", "columns", "problems", "message"),
    [
        (sample(), {"a": [1, 2]}, PROBLEMS.empty_table(), "read: 1 samples, but 2 rows of columns"),
        (sample().drop(["url"]), {"a": [1]}, PROBLEMS.empty_table(), "read: samples has the schema"),
        (sample(), {"a": [1]}, SAMPLES.empty_table(), "read: problems has the schema"),
        (sample(uid=None), {"a": [1]}, PROBLEMS.empty_table(), "read: a sample without uid"),
        (sample(key=None), {"a": [1]}, PROBLEMS.empty_table(), "read: a sample without key"),
        (sample(problem="odd"), {"a": [1]}, PROBLEMS.empty_table(), "read: unknown problem 'odd'"),
    ],
)
def test_a_format_that_breaks_its_promise_is_stopped(samples, columns, problems, message):
    with pytest.raises(SchemaError, match=message):
        check(Reading(samples, pa.table(columns), problems))
