import hashlib
import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.formats import parquet
from pipeline.formats.rows import uid_of
from pipeline.machine import Machine
from pipeline.schema import SAMPLES
from pipeline.storage import UnitFiles
from tests import pools


def png(width, height):
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (width, height, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def files(folder, table, **options):
    pq.write_table(table if isinstance(table, pa.Table) else pa.table(table), folder / "x.parquet", **options)
    return UnitFiles(pools.unit_of(parquet=folder / "x.parquet"), Machine())


IMAGES = [png(3, 4), None, b"no image", png(5, 6)]
METADATA = {
    "TEXT": ["a", "b", "c", ""],
    "URL": ["u0", "u1", "u2", "u3"],
    "WIDTH": [100, 100, 100, None],
    "HEIGHT": [200, 200, 200, None],
}


@pytest.mark.parametrize("group_rows", [1, 3, 100])
@pytest.mark.parametrize("struct", [False, True])
def test_images_in_a_column_worked_by_hand(tmp_path, struct, group_rows):
    column = pa.array([{"bytes": data, "path": "p"} for data in IMAGES]) if struct else pa.array(IMAGES)
    unit = files(tmp_path, {"image": column, **METADATA}, row_group_size=group_rows)
    reading = parquet.read(unit)
    samples = reading.samples
    assert samples.schema == SAMPLES
    assert samples["key"].to_pylist() == ["0", "1", "2", "3"]
    assert samples["uid"].to_pylist() == [
        hashlib.sha256(IMAGES[0] + b"\0a").digest()[:16],
        uid_of(b"u1", "b"),
        uid_of(IMAGES[2], "c"),
        uid_of(IMAGES[3], ""),
    ]
    assert samples["problem"].to_pylist() == [None, "missing_image", None, "missing_caption"]
    assert samples["sha256"].to_pylist() == [data and hashlib.sha256(data).hexdigest() for data in IMAGES]
    assert samples["width"].to_pylist() == [100, 100, 100, 5]
    assert samples["height"].to_pylist() == [200, 200, 200, 6]
    assert samples["source_row"].to_pylist() == [0, 1, 2, 3]
    assert reading.columns.to_pydict() == METADATA
    assert reading.problems["key"].to_pylist() == ["1", "3"]
    assert list(parquet.images(unit, samples)) == IMAGES
    assert list(parquet.images(unit, samples.take([0, 3]))) == [IMAGES[0], IMAGES[3]]
    assert list(parquet.images(unit, samples.slice(0, 0))) == []


def test_the_pool_s_own_uid_and_sha256_win(tmp_path):
    table = {"jpg": [b"x"], "uid": ["AB" * 16], "sha256": ["f" * 64], "caption": ["c"]}
    samples = parquet.read(files(tmp_path, table)).samples
    assert samples["uid"].to_pylist() == [b"\xab" * 16]
    assert samples["key"].to_pylist() == ["ab" * 16]
    assert samples["sha256"].to_pylist() == ["f" * 64]


@pytest.mark.parametrize(
    ("columns", "name"),
    [
        ({"jpg": pa.binary(), "exif": pa.binary()}, "jpg"),
        ({"PNG": pa.large_binary(), "image": pa.string()}, "PNG"),
        ({"webp": pa.binary(), "image": pa.struct([("bytes", pa.binary()), ("path", pa.string())])}, "image"),
        ({"picture": pa.binary(), "text": pa.string()}, "picture"),
        ({"one": pa.binary(), "two": pa.binary()}, None),
        ({"url": pa.string(), "image": pa.struct([("path", pa.string())])}, None),
        ({"image": pa.struct([("bytes", pa.struct([("bytes", pa.binary())]))])}, None),
    ],
)
def test_the_image_column_is_found_by_name_or_by_being_the_only_one(columns, name):
    assert parquet.image_column(pa.schema(list(columns.items()))) == name


def test_a_parquet_without_images_is_a_pool_of_metadata(tmp_path):
    unit = files(tmp_path, METADATA)
    reading = parquet.read(unit)
    assert reading.samples["problem"].to_pylist() == [None, None, None, "missing_caption"]
    assert reading.samples["uid"].to_pylist()[0] == uid_of(b"u0", "a")
    assert list(parquet.images(unit, reading.samples)) == [None] * 4


def test_a_parquet_of_nothing_but_images_keeps_its_rows(tmp_path):
    reading = parquet.read(files(tmp_path, {"image": [png(3, 4), png(1, 1)]}))
    assert len(reading.samples) == len(reading.columns) == 2
    assert reading.samples["width"].to_pylist() == [3, 1]
    assert reading.samples["problem"].to_pylist() == ["missing_caption"] * 2


@pytest.mark.parametrize("names", [("jpg", "txt", "txt"), ("jpg", "jpg", "txt")])
def test_of_columns_that_share_a_name_the_first_counts(tmp_path, names):
    values = {"jpg": [png(3, 4), png(1, 1)], "txt": ["a", "b"]}
    others = [names.index(name) < at for at, name in enumerate(names)]
    arrays = [
        pa.array(values[name][::-1] if other else values[name]) for name, other in zip(names, others, strict=True)
    ]
    unit = files(tmp_path, pa.Table.from_arrays(arrays, names))
    reading = parquet.read(unit)
    assert reading.columns.to_pydict() == {"txt": ["a", "b"]}
    assert reading.samples["width"].to_pylist() == [3, 1]
    assert list(parquet.images(unit, reading.samples)) == values["jpg"]


@pytest.mark.parametrize("data", [b"", b"PAR1junk"])
def test_a_file_that_is_no_parquet_is_a_lost_shard_without_images(tmp_path, data):
    (tmp_path / "x.parquet").write_bytes(data)
    unit = UnitFiles(pools.unit_of(parquet=tmp_path / "x.parquet"), Machine())
    reading = parquet.read(unit)
    assert [(line["key"], line["reason"]) for line in reading.problems.to_pylist()] == [(None, "bad_metadata")]
    assert list(parquet.images(unit, reading.samples)) == []


def test_rows_that_were_not_downloaded_are_not_listed(tmp_path):
    table = {"jpg": [None, b"x"], "caption": ["a", "b"], "status": ["failed_to_download", "success"]}
    unit = files(tmp_path, table)
    reading = parquet.read(unit)
    assert reading.samples["key"].to_pylist() == ["1"]
    assert reading.samples["problem"].to_pylist() == [None]
    assert list(parquet.images(unit, reading.samples)) == [b"x"]


@pytest.mark.parametrize("column", ["caption", "jpg"])
def test_a_damaged_row_group_costs_its_own_rows(tmp_path, column):
    random = np.random.default_rng(0)
    table = {"jpg": [random.bytes(500) for _ in range(9)], "caption": [random.bytes(99).hex() for _ in range(9)]}
    files(tmp_path, table, row_group_size=3, use_dictionary=False, compression="snappy")
    path = tmp_path / "x.parquet"
    with pq.ParquetFile(path) as file:
        chunk = file.metadata.row_group(1).column(["jpg", "caption"].index(column))
    data = bytearray(path.read_bytes())
    data[chunk.data_page_offset : chunk.data_page_offset + 60] = b"\xff" * 60
    path.write_bytes(data)
    unit = UnitFiles(pools.unit_of(parquet=path), Machine())
    reading = parquet.read(unit)
    assert reading.samples["key"].to_pylist() == ["0", "1", "2", "6", "7", "8"]
    assert reading.samples["source_row"].to_pylist() == [0, 1, 2, 6, 7, 8]
    assert reading.samples["uid"].to_pylist()[3] == uid_of(table["jpg"][6], table["caption"][6])
    [line] = reading.problems.to_pylist()
    assert (line["key"], line["reason"]) == (None, "bad_metadata")
    assert line["detail"].startswith("rows 3 to 5: ")
    assert list(parquet.images(unit, reading.samples)) == table["jpg"][:3] + table["jpg"][6:]


def test_a_foreign_file_is_a_line_of_problems(tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"<html>403 Forbidden</html>")
    reading = parquet.read(UnitFiles(pools.unit_of(parquet=tmp_path / "x.parquet"), Machine()))
    assert len(reading.samples) == len(reading.columns) == 0
    assert reading.problems["reason"].to_pylist() == ["bad_metadata"]


def test_a_file_without_rows_is_an_empty_shard(tmp_path):
    reading = parquet.read(files(tmp_path, {"jpg": pa.array([], pa.binary()), "caption": pa.array([], pa.string())}))
    assert reading.problems["reason"].to_pylist() == ["empty"]
    assert reading.columns.column_names == ["caption"]


def test_memory_is_that_of_a_few_images_not_of_a_row_group(tmp_path):
    images = [bytes([i]) * (1 << 20) for i in range(128)]
    unit = files(tmp_path, {"jpg": images}, use_dictionary=False, write_batch_size=8, compression="none")
    del images
    samples = parquet.read(unit).samples
    held = [pa.total_allocated_bytes() for _ in parquet.images(unit, samples)]
    assert len(held) == 128
    assert max(held) < 64 << 20


@pytest.mark.parametrize("struct", [False, True])
def test_the_generated_pool_is_read(tmp_path, struct):
    pools.parquet_pool(tmp_path, shards=1, rows=12, seed=1, struct=struct)
    unit = UnitFiles(pools.unit_of(parquet=next(tmp_path.glob("*.parquet"))), Machine())
    reading = parquet.read(unit)
    problems = reading.samples["problem"].to_pylist()
    assert {row: problem for row, problem in enumerate(problems) if problem} == {
        3: "missing_caption",
        4: "missing_image",
    }
    assert reading.columns.column_names == ["URL", "TEXT", "similarity"]
    assert sum(image is not None for image in parquet.images(unit, reading.samples)) == 11
