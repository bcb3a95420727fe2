import base64
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.formats.metadata import (
    CORE,
    MAX_FIELDS,
    MetadataError,
    core,
    from_json,
    load_sidecar,
    open_parquet,
    parse_json,
    unify,
)

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(), children, max_size=3),
    max_leaves=6,
)
OBJECTS = st.lists(st.none() | st.dictionaries(st.sampled_from("abcd") | st.text(), VALUES, max_size=5), max_size=6)


def write(path, table, **options):
    pq.write_table(table, path, **options)
    return str(path)


def test_a_sidecar_comes_back_as_plain_columns(tmp_path):
    table = pa.table(
        {
            "caption": pa.array(["a", "b", "a"]).dictionary_encode(),
            "url": pa.array(["u", None, "w"], pa.large_string()),
            "width": pa.array([1, 2, 3], pa.int32()),
        }
    )
    read = load_sidecar(write(tmp_path / "a.parquet", table))
    assert read.schema.types == [pa.string(), pa.string(), pa.int32()]
    assert read.to_pydict() == {"caption": ["a", "b", "a"], "url": ["u", None, "w"], "width": [1, 2, 3]}


def test_invalid_utf8_in_a_sidecar_costs_one_value(tmp_path):
    broken = pa.Array.from_buffers(pa.string(), 2, pa.array([b"ok", b"\xff!"]).buffers())
    assert load_sidecar(write(tmp_path / "a.parquet", pa.table({"text": broken})))["text"].to_pylist() == [
        "ok",
        "\ufffd!",
    ]


def test_of_columns_that_share_a_name_the_first_is_read(tmp_path):
    table = pa.Table.from_arrays([pa.array([1]), pa.array([2]), pa.array([3])], names=["b", "a", "b"])
    assert load_sidecar(write(tmp_path / "a.parquet", table)).to_pydict() == {"b": [1], "a": [2]}


class Canary(pa.ExtensionType):
    """Stands for Ray's tensors, which unpickle their metadata when a schema is read."""

    opened: list[bytes] = []

    def __init__(self):
        super().__init__(pa.int64(), "test.canary")

    def __arrow_ext_serialize__(self):
        return b"payload"

    @classmethod
    def __arrow_ext_deserialize__(cls, storage_type, serialized):
        cls.opened.append(serialized)
        return cls()


@pytest.mark.parametrize("padding", ["", "x", "xx", "xxx", "xxxx"])
def test_extension_types_are_refused_before_arrow_reads_the_schema(tmp_path, padding):
    pa.register_extension_type(Canary())
    try:
        array = pa.ExtensionArray.from_storage(Canary(), pa.array([1]))
        path = write(tmp_path / "a.parquet", pa.table({padding + "a": pa.array([1]), "b": array}))
        Canary.opened.clear()
        with pytest.raises(MetadataError, match="extension types are refused"):
            load_sidecar(path)
        assert Canary.opened == []
        pq.ParquetFile(path).close()
        assert Canary.opened == [b"payload"]  # the control: Arrow alone would have opened it
    finally:
        pa.unregister_extension_type("test.canary")


def test_every_alignment_of_an_extension_name_is_found(tmp_path):
    for shift in range(3):
        text = base64.b64encode(b"x" * shift + b"ARROW:extension:name").decode()
        table = pa.table({"a": [1]}).replace_schema_metadata({"note": text})
        with pytest.raises(MetadataError, match="extension"):
            open_parquet(write(tmp_path / "a.parquet", table))


def test_foreign_and_damaged_files_are_named_not_raised(tmp_path):
    good = (tmp_path / "good.parquet").as_posix()
    write(good, pa.table({"a": list(range(1000)), "b": ["x" * 10] * 1000}), compression="none", use_dictionary=False)
    data = (tmp_path / "good.parquet").read_bytes()
    bad = tmp_path / "bad.parquet"
    reasons = {}
    for name, content in {
        "empty": b"",
        "html": b"<html>403</html>",
        "cut": data[:-20],
        "garbage footer": data[:-200] + b"\xff" * 190 + data[-10:],
        "length": data[:-8] + b"\xff\xff\xff\x7fPAR1",
        "pages": b"PAR1" + b"\xff" * (len(data) // 2) + data[len(data) // 2 + 4 :],
    }.items():
        bad.write_bytes(content)
        with pytest.raises(MetadataError) as caught:
            load_sidecar(str(bad))
        reasons[name] = str(caught.value)
    assert reasons["empty"] == reasons["html"] == reasons["cut"] == "not a parquet file, or cut short"
    assert all(reasons.values())
    assert all("\n" not in reason for reason in reasons.values())


def test_a_missing_file_is_no_damage(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_sidecar(str(tmp_path / "none.parquet"))


def test_json_worked_by_hand():
    assert parse_json(b'\xef\xbb\xbf{"a": 1, "b": [1.5, null], "c": "\xc3\xa9"}') == {
        "a": 1,
        "b": [1.5, None],
        "c": "\u00e9",
    }
    assert parse_json(rb'{"a\u0000": ["\ud800x", "\ud83d\ude00"], "b": {"c": "\udfff"}}') == {
        "a\ufffd": ["\ufffdx", "\U0001f600"],
        "b": {"c": "\ufffd"},
    }


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b'{"a": "' + b"x" * (1 << 20) + b'"}', "JSON larger than 1048576 bytes"),
        (b'{"a": "\xff"}', "JSON is not UTF-8"),
        (b"", "not valid JSON"),
        (b'{"a": ', "not valid JSON"),
        (b"[1]", "JSON is not an object"),
        (b"null", "JSON is not an object"),
        (b'{"a": NaN}', "NaN is not a finite number"),
        (b'{"a": -Infinity}', "-Infinity is not a finite number"),
        (b'{"a": 1e999}', "1e999 is not a finite number"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON: Exceeds the limit"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "not valid JSON: maximum recursion"),
        (b'{"a": ' + b"[" * 70 + b"]" * 70 + b"}", "JSON nested deeper than 64 levels"),
    ],
)
def test_json_that_is_refused_says_why(data, reason):
    with pytest.raises(MetadataError) as caught:
        parse_json(data)
    assert str(caught.value).startswith(reason) or reason in str(caught.value)


def test_from_json_worked_by_hand():
    table = from_json(
        [
            {"w": 1, "score": 1, "caption": "a", "none": None, "box": [[1, 2]], "exif": {}, "big": 1},
            None,
            {"w": 2, "score": 0.5, "caption": 7, "box": [], "exif": {"k": [1]}, "big": 2**64, "tags": []},
        ]
    )
    assert table.to_pydict() == {
        "w": [1, None, 2],
        "score": [1.0, None, 0.5],
        "caption": ["a", None, "7"],
        "none": [None, None, None],
        "box": [[[1, 2]], None, []],
        "exif": ["{}", None, '{"k": [1]}'],
        "big": ["1", None, str(2**64)],
        "tags": [None, None, "[]"],
    }
    assert table.schema.field("none").type == pa.string()
    assert table.schema.field("w").type == pa.int64()


def test_rows_without_any_field_are_still_counted():
    assert from_json([None, {}, None]).to_pydict() == {"caption": [None] * 3}
    assert unify([from_json([None]), from_json([{}, {}])]).num_rows == 3
    assert core(from_json([None, {}])).num_rows == 2


def test_fields_beyond_the_cap_are_not_made_columns():
    assert from_json([{str(i): 1 for i in range(MAX_FIELDS + 5)}]).num_columns == MAX_FIELDS


@given(OBJECTS)
def test_any_json_becomes_columns_that_parquet_can_hold(objects):
    parsed = [None if value is None else parse_json(json.dumps(value).encode()) for value in objects]
    table = from_json(parsed)
    assert table.num_rows == len(objects)
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    assert pq.read_table(sink.getvalue()).num_rows == len(objects)
    for name in table.column_names:
        nulls = [value is None or value.get(name) is None for value in parsed]
        assert table[name].is_null().to_pylist() == nulls


def test_core_worked_by_hand():
    columns = pa.table(
        {
            "TEXT": ["t0", "t1", None, "t3"],
            "URL": ["u", None, "v", "w"],
            "Width": pa.array([10.0, 0.0, 2.5, float("nan")]),
            "HEIGHT": ["10", "-3", "12.0", "wide"],
            "original_width": pa.array([2**63, 5, 6, None], pa.uint64()),
            "uid": ["AB" * 16, "a" * 31, "g" * 32, "c" * 32 + "\n"],
            "SHA256": ["F" * 64, "f" * 32, None, "x" * 64],
        }
    )
    assert core(columns).to_pydict() == {
        "caption": ["t0", "t1", None, "t3"],
        "url": ["u", None, "v", "w"],
        "sha256": ["f" * 64, None, None, None],
        "width": [10, None, None, None],
        "height": [10, None, 12, None],
        "original_width": [None, 5, 6, None],
        "original_height": [None] * 4,
        "uid": ["ab" * 16, None, None, None],
        "status": [None] * 4,
    }
    assert core(columns).schema == CORE


def test_the_first_alias_that_names_a_column_is_used():
    columns = pa.table({"top_caption": ["3"], "TXT": ["2"], "Text": ["1"]})
    assert core(columns)["caption"].to_pylist() == ["1"]
    assert core(columns.append_column("CAPTION", [["0"]]))["caption"].to_pylist() == ["0"]


def test_columns_of_unfit_types_are_read_as_far_as_they_fit():
    columns = pa.table({"caption": [[1], [2]], "url": [1, None], "status": [b"ok", b"\xff"], "width": [[1], None]})
    read = core(columns)
    assert read["caption"].to_pylist() == [None, None]
    assert read["url"].to_pylist() == ["1", None]
    assert read["status"].to_pylist() == ["ok", "\ufffd"]
    assert read["width"].to_pylist() == [None, None]


def test_unify_worked_by_hand():
    joined = unify(
        [
            pa.table({"i": pa.array([1], pa.int32()), "f": [1], "s": ["a"], "n": pa.nulls(1), "b": [2**60]}),
            pa.table({"i": pa.array([2], pa.int64()), "f": [0.5], "s": [7], "n": [True], "b": [0.5], "new": [[1]]}),
            pa.table({"i": pa.nulls(1, pa.string()), "s": pa.array([{"k": None}])}),
        ]
    )
    assert joined.to_pydict() == {
        "i": [1, 2, None],
        "f": [1.0, 0.5, None],
        "s": ["a", "7", '{"k": null}'],
        "n": [None, True, None],
        "b": [str(2**60), "0.5", None],  # 2^60 + 1 could not be told from it as float64
        "new": [None, [1], None],
    }
    assert joined.schema.field("i").type == pa.int64()
    assert unify([]).num_rows == 0


@given(st.lists(OBJECTS, max_size=4))
def test_unify_keeps_every_row_of_any_json(units):
    tables = [
        from_json([None if v is None else parse_json(json.dumps(v).encode()) for v in objects]) for objects in units
    ]
    joined = unify(tables)
    assert joined.num_rows == sum(map(len, tables))
    for name in joined.column_names:
        nulls = [
            n for t in tables for n in (t[name].is_null().to_pylist() if name in t.column_names else [True] * len(t))
        ]
        assert joined[name].is_null().to_pylist() == nulls
