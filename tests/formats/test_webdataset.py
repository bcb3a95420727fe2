"""The webdataset layout: which rows a shard has, what each says, and what is reported of the damaged ones."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.formats import webdataset
from pipeline.formats.reading import Reading
from pipeline.formats.tar import END, member_header
from pipeline.images import MAX_BYTES
from pipeline.schema import PROBLEMS, SAMPLE_PROBLEMS, SAMPLES, SHARD_PROBLEMS
from pipeline.stage import LocalFile, Source
from tests import corpus
from tests.corpus import OnDisk, Shard

A, B, C = corpus.KEYS[:3]


def opened(tmp_path: Path, data: bytes, sidecar: pa.Table | bytes | None = None, damage: str | None = None) -> OnDisk:
    paths = {"tar": tmp_path / "0.tar"}
    paths["tar"].write_bytes(data)
    if sidecar is not None:
        paths["sidecar"] = tmp_path / "0.parquet"
        if isinstance(sidecar, bytes):
            paths["sidecar"].write_bytes(sidecar)
        else:
            pq.write_table(sidecar, paths["sidecar"])
    return OnDisk(paths, damage)


def reading(tmp_path: Path, data: bytes, sidecar: pa.Table | bytes | None = None) -> Reading:
    result = webdataset.read(opened(tmp_path, data, sidecar))
    assert result.samples.schema == SAMPLES
    assert result.problems.schema == PROBLEMS
    assert len(result.columns) == len(result.samples)
    result.samples.validate(full=True)
    result.problems.validate(full=True)
    return result


def rows(result: Reading) -> list[dict[str, Any]]:
    return result.samples.to_pylist()


def details(result: Reading) -> list[tuple[Any, ...]]:
    return [tuple(line.values()) for line in result.problems.to_pylist()]


def sha(*parts: bytes) -> bytes:
    return hashlib.sha256(b"\0".join(parts)).digest()[:16]


def png(width: int, height: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (width, height)).save(stream, "PNG")
    return stream.getvalue()


@pytest.mark.parametrize("case", corpus.everything(), ids=lambda case: case.name)
def test_every_row_of_a_damaged_shard_is_kept_or_has_its_problem(tmp_path: Path, case: corpus.Case) -> None:
    result = reading(tmp_path, case.data)
    found = [(row["key"], row["problem"]) for row in rows(result)]
    assert [key for key, problem in found if problem is None] == list(case.kept)
    refused = [(key, problem) for key, problem in found if problem]
    assert [problem for _, problem in refused] == [problem for _, problem in case.problems]
    assert all(truth in (None, key) for (key, _), (truth, _) in zip(refused, case.problems, strict=True))
    lines = details(result)
    assert [reason for key, _, reason, _ in lines if key is None] == list(case.faults)
    assert [(key, reason) for key, _, reason, _ in lines if key is not None] == refused
    assert {reason for _, _, reason, _ in lines} <= {*SAMPLE_PROBLEMS, *SHARD_PROBLEMS}


@pytest.mark.parametrize("case", corpus.names(), ids=lambda case: case.name)
def test_nothing_of_an_unsafe_name_goes_further(tmp_path: Path, case: corpus.Case) -> None:
    result = reading(tmp_path, case.data)
    row = next(row for row in rows(result) if row["problem"])
    assert row["key"].startswith("unsafe-")
    assert len(row["key"]) == len("unsafe-") + 16
    texts = [row["key"], *(member["name"] for member in row["members"]), *details(result)[0][2:]]
    assert all(text.isascii() and text.isprintable() and len(text) < 600 for text in texts)


def test_a_stand_in_for_a_key_is_the_digest_of_the_key(tmp_path: Path) -> None:
    result = reading(tmp_path, Shard().add("../x.jpg", b"i").add("../x.txt", b"t").closed())
    assert [row["key"] for row in rows(result)] == ["unsafe-" + hashlib.sha256(b"../x").hexdigest()[:16]]
    assert "'../x.jpg' leaves its folder" in details(result)[0][3]


def test_a_sound_sample_says_all_of_this(tmp_path: Path) -> None:
    image = png(7, 5)
    meta = b'{"url": "http://a", "original_width": 70, "original_height": 50, "extra": [1, 2]}'
    data = (
        Shard()
        .add("d/0.JPG", image)
        .add("d/0.txt", " ą\n".encode())
        .add("d/0.json", meta)
        .add("d/0.cls", b"3")
        .closed()
    )
    result = reading(tmp_path, data)
    offsets = [512, 512 + 512 + 512]
    assert len(image) <= 512
    assert rows(result) == [
        {
            "uid": sha(image, " ą\n".encode()),
            "key": "d/0",
            "problem": None,
            "caption": " ą\n",
            "url": "http://a",
            "sha256": hashlib.sha256(image).hexdigest(),
            "width": 7,
            "height": 5,
            "original_width": 70,
            "original_height": 50,
            "source_row": None,
            "image": {"name": "d/0.JPG", "offset": 512, "bytes": len(image)},
            "members": [
                {"name": "d/0.JPG", "offset": 512, "bytes": len(image)},
                {"name": "d/0.txt", "offset": offsets[1], "bytes": 4},
                {"name": "d/0.json", "offset": offsets[1] + 1024, "bytes": len(meta)},
                {"name": "d/0.cls", "offset": offsets[1] + 2048, "bytes": 1},
            ],
        }
    ]
    assert result.columns.to_pylist() == [
        {"url": "http://a", "original_width": 70, "original_height": 50, "extra": [1, 2]}
    ]
    assert details(result) == []


def test_what_the_metadata_says_wins_over_the_image(tmp_path: Path) -> None:
    meta = b'{"UID": "%s", "sha256": "%s", "width": 9, "height": 8}' % (b"AB" * 16, b"CD" * 32)
    [row] = rows(reading(tmp_path, Shard().add("0.png", png(2, 3)).add("0.txt", b"t").add("0.json", meta).closed()))
    assert row["uid"] == b"\xab" * 16
    assert row["sha256"] == "cd" * 32
    assert (row["width"], row["height"]) == (9, 8)


def test_a_uid_or_digest_of_another_form_is_computed(tmp_path: Path) -> None:
    meta = b'{"uid": "abc", "sha256": "%s", "width": -1, "height": 8}' % (b"g" * 64)
    [row] = rows(reading(tmp_path, Shard().add("0.png", png(2, 3)).add("0.txt", b"t").add("0.json", meta).closed()))
    assert row["uid"] == sha(png(2, 3), b"t")
    assert row["sha256"] == hashlib.sha256(png(2, 3)).hexdigest()
    assert (row["width"], row["height"]) == (2, 3)


def test_equal_pairs_have_equal_uids_wherever_the_caption_stands(tmp_path: Path) -> None:
    data = Shard().add("0.jpg", b"i").add("0.txt", b"words").add("1.jpg", b"i").add("1.json", b'{"caption": "words"}')
    first, second = rows(reading(tmp_path, data.closed()))
    assert first["uid"] == second["uid"] == sha(b"i", b"words")


def test_a_row_without_image_has_the_uid_of_its_url_or_key_and_caption(tmp_path: Path) -> None:
    data = Shard().add("0.txt", b"t").add("0.json", b'{"url": "u"}').add("1.txt", b"t").closed()
    first, second = rows(reading(tmp_path, data))
    assert (first["uid"], second["uid"]) == (sha(b"u", b"t"), sha(b"1", b"t"))
    assert first["sha256"] is None
    assert first["image"] is None


def test_a_txt_beats_the_json_and_the_first_alias_beats_the_next(tmp_path: Path) -> None:
    meta = b'{"text": "second", "Caption": "first", "top_caption": 3}'
    data = Shard().add("0.jpg", b"i").add("0.json", meta).add("1.jpg", b"i").add("1.json", meta).add("1.txt", b"own")
    assert [row["caption"] for row in rows(reading(tmp_path, data.closed()))] == ["first", "own"]


def test_a_caption_that_is_not_utf8_is_shown_with_replacements(tmp_path: Path) -> None:
    result = reading(tmp_path, Shard().add("0.jpg", b"i").add("0.txt", b"caf\xe9").closed())
    assert rows(result)[0]["caption"] == "caf\ufffd"
    assert details(result)[0][3] == ".txt is not UTF-8: unexpected end of data at byte 3"


def test_a_nul_in_a_caption_is_replaced(tmp_path: Path) -> None:
    data = Shard().add("0.jpg", b"i").add("0.txt", b"a\0b").add("1.jpg", b"i").add("1.txt", b"a\0\xff").closed()
    assert [row["caption"] for row in rows(reading(tmp_path, data))] == ["a\ufffdb", "a\ufffd\ufffd"]


def test_the_earlier_problem_of_the_order_is_the_rows(tmp_path: Path) -> None:
    result = reading(tmp_path, corpus.member("../x.jpg", b"i" * 900)[:-512])
    assert [row["problem"] for row in rows(result)] == ["unsafe_name"]
    assert "damaged_member: '../x.jpg' is cut" in details(result)[1][3]


def test_a_broken_json_leaves_the_caption_of_the_txt_in_the_row(tmp_path: Path) -> None:
    [row] = rows(reading(tmp_path, Shard().add("0.jpg", b"i").add("0.txt", b"words").add("0.json", b"{").closed()))
    assert (row["problem"], row["caption"]) == ("bad_metadata", "words")


def test_the_first_of_two_images_is_the_image(tmp_path: Path) -> None:
    data = Shard().add("0.webp", b"first").add("0.jpg", b"second").add("0.txt", b"t").closed()
    files = opened(tmp_path, data)
    assert list(webdataset.images(files, webdataset.read(files).samples)) == [b"first"]


def test_a_later_copy_is_a_row_of_its_own_with_its_own_members(tmp_path: Path) -> None:
    data = Shard().add("0.jpg", b"one").add("0.txt", b"1").add("0.jpg", b"two").add("0.txt", b"2").closed()
    files = opened(tmp_path, data)
    result = webdataset.read(files)
    assert [(r["key"], r["caption"], r["problem"]) for r in rows(result)] == [
        ("0", "1", None),
        ("0", "2", "duplicate_key"),
    ]
    assert list(webdataset.images(files, result.samples)) == [b"one", b"two"]
    assert details(result)[0][:3] == ("0", 2048, "duplicate_key")


def test_the_other_problems_of_a_row_stand_in_its_line(tmp_path: Path) -> None:
    result = reading(tmp_path, Shard().add("0.json", b"{").closed())
    assert [line[2] for line in details(result)] == ["missing_image"]
    assert "bad_metadata: .json:" in details(result)[0][3]
    assert "missing_caption: no .txt" in details(result)[0][3]


def test_a_sample_between_damage_is_kept_when_it_lacks_nothing(tmp_path: Path) -> None:
    junk = b"\x01" * 512
    data = Shard().sample(A).add(f"{B}.jpg", b"i").raw(junk).add(f"{B}.txt", b"t").add(f"{B}.json", b"{}").sample(C)
    result = reading(tmp_path, data.closed())
    assert [row["problem"] for row in rows(result)] == [None, None, None]
    assert [line[2] for line in details(result)] == ["bad_header"]


def test_an_image_over_the_limit_is_too_large_and_still_has_its_uid(tmp_path: Path) -> None:
    files = opened(tmp_path, b"")
    with open(files.paths["tar"], "wb") as file:
        file.write(member_header("0.jpg", MAX_BYTES + 1))
        file.seek(-(-(MAX_BYTES + 1) // 512) * 512, os.SEEK_CUR)
        file.write(member_header("0.txt", 1) + b"t".ljust(512, b"\0") + END)
    [row] = rows(webdataset.read(files))
    assert row["problem"] == "image_too_large"
    assert row["uid"] == sha(bytes(MAX_BYTES + 1), b"t")


def sidecar(**columns: Sequence[Any]) -> pa.Table:
    return pa.table({name: list(values) for name, values in columns.items()})


def test_the_sidecar_is_joined_by_key_whatever_its_order_and_count(tmp_path: Path) -> None:
    table = sidecar(
        key=[C, "gone", A, "failed", "null"],
        status=["success", "success", "success", "failed_to_download", None],
        caption=["not c", "gone's", "not a", "x", "null's"],
        score=[3.0, 9.0, 1.0, 7.0, 8.0],
        url=["c", "g", "a", "f", "n"],
    )
    result = reading(tmp_path, corpus.healthy([A, B, C]), table)
    got = rows(result)
    assert [row["key"] for row in got] == [A, B, C, "gone", "null"]
    assert [row["source_row"] for row in got] == [2, None, 0, 1, 4]
    assert [row["url"] for row in got] == ["a", f"http://pool/{B}", "c", "g", "n"]
    assert [row["problem"] for row in got] == [None, None, None, "missing_image", "missing_image"]
    assert got[0]["caption"] == f"caption of '{A}'"
    assert got[3]["caption"] == "gone's"
    assert got[3]["uid"] == sha(b"g", b"gone's")
    assert (got[3]["image"], got[3]["members"]) == (None, [])
    assert result.columns.column_names == table.column_names
    assert result.columns["score"].to_pylist() == [1.0, None, 3.0, 9.0, 8.0]
    assert details(result)[0] == ("gone", None, "missing_image", "listed in the sidecar, not in the tar")


def test_a_key_with_a_leading_dot_and_slash_is_joined(tmp_path: Path) -> None:
    got = rows(reading(tmp_path, Shard().sample("./x").closed(), sidecar(key=["x"], status=["success"])))
    assert [(row["key"], row["source_row"]) for row in got] == [("./x", 0)]


def test_a_sidecar_without_status_lists_all_its_rows(tmp_path: Path) -> None:
    got = rows(reading(tmp_path, corpus.healthy([A]), sidecar(KEY=["y", A, None])))
    assert [row["key"] for row in got] == [A, "y", "sidecar-2"]


def test_an_unsafe_key_of_the_sidecar_gets_a_stand_in(tmp_path: Path) -> None:
    got = rows(reading(tmp_path, corpus.healthy([A]), sidecar(key=["../y", A])))
    assert [row["problem"] for row in got] == [None, "unsafe_name"]
    assert got[1]["key"].startswith("unsafe-")


def test_of_a_key_twice_in_the_sidecar_the_first_row_is_used(tmp_path: Path) -> None:
    result = reading(tmp_path, corpus.healthy([A]), sidecar(key=[A, A, "y", "y"], n=[1, 2, 3, 4]))
    assert [row["source_row"] for row in rows(result)] == [0, 2]
    assert result.columns["n"].to_pylist() == [1, 3]
    lines = details(result)
    assert [line[:3] for line in lines] == [
        (A, None, "duplicate_key"),
        ("y", None, "duplicate_key"),
        ("y", None, "missing_image"),
    ]
    assert lines[0][3] == "sidecar: row 1 repeats row 0, which is used"


@pytest.mark.parametrize(
    ("broken", "detail"),
    [(b"PAR1 not parquet", "sidecar: "), (sidecar(name=["x"]), "sidecar: no key column")],
    ids=["damaged", "without key"],
)
def test_the_tar_goes_on_without_a_broken_sidecar(tmp_path: Path, broken: pa.Table | bytes, detail: str) -> None:
    result = reading(tmp_path, corpus.healthy([A, B]), broken)
    assert [row["problem"] for row in rows(result)] == [None, None]
    assert result.columns["url"].to_pylist() == [f"http://pool/{A}", f"http://pool/{B}"]
    [line] = details(result)
    assert line[:3] == (None, None, "bad_metadata")
    assert line[3].startswith(detail)


def test_rows_of_the_sidecar_are_listed_when_the_tar_is_gone(tmp_path: Path) -> None:
    result = reading(tmp_path, b"<html>", sidecar(key=[A, B]))
    assert [(row["key"], row["problem"]) for row in rows(result)] == [(A, "missing_image"), (B, "missing_image")]
    assert details(result)[0][2] == "not_a_tar"


def test_rows_of_a_lost_tar_are_listed_and_the_shard_is_named(tmp_path: Path) -> None:
    pq.write_table(sidecar(key=[A, B, C], status=["success", "failed_to_download", "success"]), tmp_path / "0.parquet")
    result = webdataset.read(OnDisk({"sidecar": tmp_path / "0.parquet"}))
    assert [(row["key"], row["problem"]) for row in rows(result)] == [(A, "missing_image"), (C, "missing_image")]
    assert details(result)[0] == (None, 0, "empty", "no data; there is no tar beside this parquet file")


def test_metadata_of_the_json_members_is_aligned_with_the_rows(tmp_path: Path) -> None:
    data = Shard().add("0.json", b'{"a": 1}').add("1.txt", b"t").add("2.json", b'{"a": 2, "b": "x"}').closed()
    assert reading(tmp_path, data).columns.to_pylist() == [
        {"a": 1, "b": None},
        {"a": None, "b": None},
        {"a": 2, "b": "x"},
    ]


def test_what_decompression_found_is_told(tmp_path: Path) -> None:
    cut = webdataset.read(opened(tmp_path, corpus.healthy()[:-1024], damage="stream ended"))
    assert [line[2:] for line in details(cut)] == [("truncated", "no two zero blocks at the end; stream ended")]
    whole = webdataset.read(opened(tmp_path, corpus.healthy(), damage="bad CRC"))
    assert [line[2:] for line in details(whole)] == [("truncated", "decompression failed; bad CRC")]


@pytest.mark.parametrize("count", [3, 100])
def test_images_come_in_the_order_of_the_rows_asked_for(tmp_path: Path, count: int) -> None:
    keys = [f"{i:03d}" for i in range(count)]
    files = opened(tmp_path, Shard().samples(keys).add("x.txt", b"no image").closed())
    samples = webdataset.read(files).samples
    order = [count, *reversed(range(count))]
    expected = [None, *(corpus.parts(key)["jpg"] for key in reversed(keys))]
    assert list(webdataset.images(files, samples.take(order))) == expected


@dataclass(frozen=True)
class Fetched(OnDisk):
    """Remembers what was fetched whole."""

    whole: list[str] = field(default_factory=list)

    def open(self, role: str) -> LocalFile:
        self.whole.append(role)
        return super().open(role)


def test_a_shard_is_fetched_whole_for_many_images_only(tmp_path: Path) -> None:
    files = Fetched(opened(tmp_path, Shard().samples(f"{i:03d}" for i in range(100)).closed()).paths)
    samples = webdataset.read(files).samples
    files.whole.clear()
    assert len(list(webdataset.images(files, samples.slice(0, 64)))) == 64
    assert files.whole == []
    assert len(list(webdataset.images(files, samples))) == 100
    assert files.whole == ["tar"]


def test_a_tar_that_shrank_after_it_was_listed_is_an_error_of_storage(tmp_path: Path) -> None:
    files = opened(tmp_path, corpus.healthy([A]))
    samples = webdataset.read(files).samples
    os.truncate(files.paths["tar"], 600)
    with pytest.raises(OSError, match=f"{A}.jpg: 88 of 812 bytes; the tar changed since it was listed"):
        list(webdataset.images(files, samples))


def test_units_are_tars_with_the_sidecar_of_their_stem() -> None:
    names = [
        "a/0.tar",
        "a/0.parquet",
        "a/0_stats.json",
        "a/2.tar.gz",
        "a/2.parquet",
        "b/0.TAR",
        "b/1.tgz",
        "b/3.parquet",
        "b/labels.parquet",
        "c/4.parquet",
    ]
    sources = [(name, Source(name, 1, "e")) for name in names]
    units = webdataset.group(sources)
    assert [(unit.shard, {role: source.url for role, source in unit.sources.items()}) for unit in units] == [
        ("a/0.tar", {"tar": "a/0.tar", "sidecar": "a/0.parquet"}),
        ("a/2.tar.gz", {"tar": "a/2.tar.gz", "sidecar": "a/2.parquet"}),
        ("b/0.TAR", {"tar": "b/0.TAR"}),
        ("b/1.tgz", {"tar": "b/1.tgz"}),
        ("b/3.parquet", {"sidecar": "b/3.parquet"}),
    ]
    assert [unit.shard for unit in webdataset.group(sources[::-1])] == [unit.shard for unit in units[::-1]]


@pytest.mark.parametrize(
    ("name", "key", "suffix"),
    [("0.jpg", "0", "jpg"), ("a.b/0.Seg.PNG", "a.b/0", "seg.png"), ("README", "README", ""), ("d/.x", "d/", "x")],
)
def test_a_key_ends_at_the_first_dot_of_the_file_name(name: str, key: str, suffix: str) -> None:
    assert webdataset.split(name) == (key, suffix)


@pytest.mark.parametrize("name", ["a b.jpg", "zażółć/日本.png", "./x.jpg", "a..b.jpg", "..a", "n" * 256])
def test_ordinary_names_are_safe(name: str) -> None:
    assert webdataset.unsafe(name) is None


@settings(deadline=None)
@given(st.data())
def test_no_shard_raises_and_every_member_has_a_row(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    contents = st.one_of(st.binary(max_size=60), st.sampled_from([b'{"caption": "c"}', b'{"uid": 1}', b"{}", b"t"]))
    names = st.one_of(
        st.text(max_size=12), st.sampled_from(["0.jpg", "0.txt", "0.json", "1.jpg", "1.json", "../2.jpg"])
    )
    shard = Shard()
    for name, content in data.draw(st.lists(st.tuples(names, contents), max_size=8)):
        shard.raw(member_header(name.encode("utf-8", "replace").decode(), len(content)) + corpus.padded(content))
    hurt = bytearray(shard.closed())
    for at in data.draw(st.lists(st.integers(0, len(hurt) - 1), max_size=3)):
        hurt[at] ^= data.draw(st.integers(1, 255))
    result = reading(tmp_path_factory.mktemp("fuzz"), bytes(hurt))
    assert sum(row["problem"] is not None for row in rows(result)) == sum(
        line[0] is not None for line in details(result)
    )
