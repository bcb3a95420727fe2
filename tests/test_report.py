"""The report says what the run directory says, shows strangers' text as text, and stands alone."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import shutil
import subprocess
import tarfile
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from jobs.entry import main
from jobs.report import report
from pipeline.control import controls, lowest
from pipeline.errors import UserError
from pipeline.machine import Machine, Prices
from pipeline.pictures import SIDE_PX, characteristic, identify, shortened, thumbnail
from pipeline.planted import Told, caught
from pipeline.record import Unreadable, load_record, shown
from pipeline.report import write_report
from pipeline.storage import Root
from pipeline.tally import FINE_BITS, Drawn, Score, tally
from pipeline.vectors import ordered_bits
from tests.pools import datacomp_pool, jpeg, planted
from tests.runs import datacomp, run_recipe

ROWS = 60

HOSTILE = (
    "<script>document.title='pwned'</script>",
    '"><img src=x onerror="document.title=\'pwned\'">',
    "'><svg onload=document.title='pwned'></svg>",
    "<a href=\"javascript:document.title='pwned'\">a picture of a link</a>",
    "</style><iframe src=https://example.org/></iframe>",
    "{{ 7 * 7 }} {% for x in y %} ${7*7}",
    "]]><!-- <base href=//example.org> <meta http-equiv=refresh content=0>",
    "a picture \u202eof evil\u202c \x00 and \u2066more\u2069",
    "&lt;script&gt;alert(1)&lt;/script&gt; &#x3c;script",
    "long " * 400,
)
"""Captions that would do something in a page that trusts them."""


def hostile_pool(folder: Path) -> Path:
    """A datacomp pool with tars, whose captions are HOSTILE, each with a number so that no two are equal."""
    datacomp_pool(folder, 3, ROWS, 1)
    for shard, path in enumerate(sorted(folder.glob("*.parquet"), key=_shard_of)):
        made = planted(shard, ROWS, 1)
        table = pq.read_table(path)
        captions = [f"{HOSTILE[row % len(HOSTILE)]} number {row} of {shard}" for row in range(ROWS)]
        pq.write_table(table.set_column(table.column_names.index("text"), "text", [captions]), path)
        with tarfile.open(path.with_suffix(".tar"), "w", format=tarfile.USTAR_FORMAT) as tar:
            for row, uid in enumerate(table.column("uid").to_pylist()):
                if made.fields["status"][row] == "success":
                    _add(tar, f"{row:05d}.jpg", jpeg(made, row))
                    _add(tar, f"{row:05d}.txt", captions[row].encode())
                    _add(tar, f"{row:05d}.json", json.dumps({"uid": uid}).encode())
    return folder


def _shard_of(path: Path) -> int:
    return next(s for s in range(3) if path.stem == hashlib.md5(f"1/{s}".encode()).hexdigest())


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the hostile pool, with its report."""
    folder = tmp_path_factory.mktemp("report")
    recipe = datacomp(hostile_pool(folder / "pool"))
    recipe["select"][0] = {"filter": {"min_words": 3, "columns": {"clip_l14_similarity_score": {"min": 0.1}}}}
    recipe["select"].insert(4, {"cut": {"score": "column:clip_l14_similarity_score", "keep": 0.8}})
    run_recipe(recipe, str(folder / "run"))
    return folder / "run"


@pytest.fixture
def run(written: Path, tmp_path: Path) -> Path:
    """A copy to be tampered with; its pool stays where it was."""
    return Path(shutil.copytree(written, tmp_path / "run"))


def again(run: Path, store: str | None = None) -> tuple[str, dict[str, Any]]:
    """Write the report anew; the page and its numbers."""
    write_report(Root(str(run)), Root(store or f"{run}/store"), Machine())
    return (run / "report/index.html").read_text("utf-8"), numbers(run)


def numbers(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "report/report.json").read_bytes())
    return found


def step_of(run: Path, name: str) -> dict[str, Any]:
    return next(s for s in numbers(run)["steps"] if s["step"] == name)


def decisions(run: Path) -> pa.Table:
    return pa.concat_tables(pq.read_table(p) for p in sorted((run / "decisions").glob("*.parquet")))


def number_of(run: Path) -> np.ndarray:
    """The step that dropped each row; 99 for kept ones."""
    return np.array([99 if s is None else int(s[:2]) for s in decisions(run).column("step").to_pylist()])


class Page(HTMLParser):
    """Everything of a page that could act."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str, str]] = []
        self.text: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.mark.goal("S-d")
def test_hostile_captions_are_shown_as_text_and_nothing_in_the_page_can_act(
    written: Path, record_property: pytest.RecordProperty
) -> None:
    page = Page((written / "report/index.html").read_text("utf-8"))
    assert not page.tags & {"script", "iframe", "object", "embed", "base", "link", "form", "input"}
    for tag, name, value in page.attributes:
        assert not name.startswith("on"), (tag, name)
        assert "javascript:" not in value or name == "title"
        if name in ("src", "href", "xlink:href", "action", "srcset"):
            assert value.startswith(("data:image/jpeg;base64,", "#")), value
    text = "".join(page.text)
    for payload in HOSTILE[:3]:
        assert payload in text, "the captions must be among the rows shown, else this test shows nothing"
    assert not set("\u202e\u202c\u2066\u2069\x00") & set(text)
    record_property("figure", f"{len(HOSTILE)} kinds of captions, {len(page.attributes):,} attributes: 0 can act")


@pytest.mark.goal("S-d")
def test_the_page_forbids_scripts_and_every_request(written: Path) -> None:
    page = Page((written / "report/index.html").read_text("utf-8"))
    policy = [value for tag, name, value in page.attributes if tag == "meta" and "default-src" in value]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]
    assert "url(" not in (written / "report/index.html").read_text("utf-8")


def test_the_numbers_are_those_of_the_run(written: Path) -> None:
    found, about = numbers(written), json.loads((written / "run.json").read_bytes())
    assert [[f["step"], f["entered"], f["left"]] for f in found["funnel"]] == about["funnel"]
    table = decisions(written)
    assert found["listed"] == table.num_rows and found["kept"] == sum(table.column("kept").to_pylist())
    assert found["steps"][0]["parameters"] == {"min_words": 3, "columns.clip_l14_similarity_score.min": 0.1}
    for step in found["steps"]:
        assert sum(step["reasons"].values()) == step["entered"] - step["left"]
        assert step["clustering"] == about["health"][step["step"]]
    problems = pa.concat_tables(pq.read_table(p) for p in sorted((written / "problems").glob("*.parquet")))
    assert sum(p["samples"] for p in found["problems"]["reasons"]) == problems.num_rows - problems["key"].null_count


def test_a_histogram_counts_the_rows_that_entered_the_cut_and_those_that_it_kept(written: Path) -> None:
    score, number = decisions(written).column("score_l14").to_numpy(), number_of(written)
    histogram = step_of(written, "03-cut")["histogram"]
    entered, kept = score[number >= 3].astype(np.float64), score[number > 3].astype(np.float64)
    assert sum(histogram["before"]) == len(entered) and sum(histogram["after"]) == len(kept)
    expected, _ = np.histogram(entered, len(histogram["before"]), (histogram["low"], histogram["high"]))
    assert np.abs(np.cumsum(expected) - np.cumsum(histogram["before"])).max() <= 3  # fine bins are 0.05 % wide
    assert histogram["threshold"] == kept.min()


def test_the_rows_shown_at_a_cut_are_the_nearest_on_each_side(written: Path) -> None:
    score, number = decisions(written).column("score_l14").to_numpy().astype(np.float64), number_of(written)
    step = step_of(written, "03-cut")
    lowest_kept = sorted((score[r], r) for r in np.flatnonzero(number > 3))[:8]
    highest_dropped = sorted((-score[r], r) for r in np.flatnonzero(number == 3) if np.isfinite(score[r]))[:8]
    assert [r["row"] for r in step["near_kept"]] == [r for _, r in lowest_kept]
    assert [r["row"] for r in step["near_dropped"]] == [r for _, r in highest_dropped]
    assert all(r["value"] < r["threshold"] for r in step["near_dropped"])


def test_a_cut_counts_the_dropped_rows_that_another_score_would_drop_too(written: Path) -> None:
    table, number = decisions(written), number_of(written)
    threshold = json.loads((written / "select/05-cut/cut.json").read_bytes())["threshold"]
    below = table.column("clip_l14_similarity_score").to_numpy() < threshold
    assert step_of(written, "03-cut")["also_below"] == {"05-cut": int((below & (number == 3)).sum())}


def test_duplicates_are_shown_beside_the_row_they_repeat(written: Path) -> None:
    table, step = decisions(written), step_of(written, "02-dedup")
    assert 0 < len(step["pairs"]) <= 8 and step["near_dropped"]
    uid, duplicate_of = table.column("uid").to_pylist(), table.column("duplicate_of").to_pylist()
    for pair in [*step["pairs"], *step["near_dropped"]]:
        assert pair["uid"] == uid[pair["row"]] and not pair["kept"]
        assert pair["original"]["uid"] == duplicate_of[pair["row"]] == uid[pair["original"]["row"]]
        assert pair["value"] > pair["threshold"] == 1 - 0.07
    assert all(pair["kept"] and pair["value"] <= 1 - 0.07 for pair in step["near_kept"])
    values = [pair["value"] for pair in step["near_dropped"]]
    dropped = [v for v, n in zip(table.column("value").to_pylist(), number_of(written), strict=True) if n == 2]
    assert values == sorted(dropped)[:8]


def test_the_last_kept_and_first_dropped_rows_of_a_cluster_are_those_around_its_quota(written: Path) -> None:
    number, step = number_of(written), step_of(written, "04-density")
    parts = [pq.read_table(p) for p in sorted((written / "select/04-density/assign").glob("*.parquet"))]
    assign, entered = pa.concat_tables(parts), np.flatnonzero(number >= 4)
    cluster, distance = assign.column("cluster").to_numpy(), assign.column("distance").to_numpy()
    assert len(step["near_kept"]) == len(step["near_dropped"]) > 0
    for last, first in zip(step["near_kept"], step["near_dropped"], strict=True):
        assert last["cluster"] == first["cluster"]
        mine = cluster == last["cluster"]
        assert last["value"] == distance[mine & (number[entered] > 4)].min()
        assert first["value"] == distance[mine & (number[entered] == 4)].max()
        assert entered[np.flatnonzero(mine & (distance == last["value"]))[0]] == last["row"]


def test_concepts_show_the_rows_nearest_to_their_centroid(written: Path) -> None:
    step = step_of(written, "04-density")
    parts = [pq.read_table(p) for p in sorted((written / "select/04-density/assign").glob("*.parquet"))]
    assign = pa.concat_tables(parts)
    concept = step["largest"][0]
    mine = assign.column("cluster").to_numpy() == concept["cluster"]
    assert concept["size"] == mine.sum() == max(c["size"] for c in step["clusters"]["drawn"])
    nearest = np.sort(assign.column("distance").to_numpy()[mine])[:6]
    assert [r["value"] for r in concept["rows"]] == nearest.tolist()


def test_the_words_of_a_concept_are_counted_in_the_captions_that_entered_the_step(written: Path) -> None:
    assign = pa.concat_tables(
        pq.read_table(p) for p in sorted((written / "select/04-density/assign").glob("*.parquet"))
    )
    listed = pa.concat_tables(
        pq.read_table(p, columns=["uid", "text"]) for p in (written.parent / "pool").glob("*.parquet")
    )
    caption = dict(zip(listed.column("uid").to_pylist(), listed.column("text").to_pylist(), strict=True))
    captions = [caption[uid] for uid in assign.column("uid").to_pylist()]
    step = step_of(written, "04-density")
    words = {c["cluster"]: c["words"] for c in [*step["largest"], *step["pruned"]]}
    assert any(words.values())
    assert words == characteristic(captions, assign.column("cluster").to_numpy(), list(words))


def test_filtered_rows_are_shown_with_what_was_measured(written: Path) -> None:
    found = step_of(written, "01-filter")["by_reason"]
    rows = found["columns.clip_l14_similarity_score"]
    gaps = [r["threshold"] - r["value"] for r in rows]
    assert rows and gaps == sorted(gaps) and gaps[0] > 0


def test_the_same_run_gives_the_same_report(run: Path) -> None:
    before = [(run / "report" / name).read_bytes() for name in ("index.html", "report.json")]
    again(run)
    assert before == [(run / "report" / name).read_bytes() for name in ("index.html", "report.json")]


def test_pictures_are_small_jpegs_inside_the_page(written: Path) -> None:
    html = (written / "report/index.html").read_text("utf-8")
    found = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', html)
    assert len(found) > 30
    for data in found[:10]:
        assert max(Image.open(io.BytesIO(base64.b64decode(data))).size) <= SIDE_PX
    assert len(html) < 8_000_000


def test_a_pool_that_is_gone_leaves_a_report_without_pictures_that_says_so(run: Path) -> None:
    text = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(re.sub(r"path: .*", "path: /nowhere/pool", text, count=1))
    html, found = again(run)
    assert "data:image" not in html
    assert found["note"] == "The pool could not be listed (pool.path), so there are no pictures here."
    assert step_of(run, "03-cut")["near_kept"][0]["caption"]


def test_a_store_that_is_gone_leaves_a_report_without_captions_that_says_so(run: Path, tmp_path: Path) -> None:
    before = numbers(run)
    html, found = again(run, str(tmp_path / "empty"))
    assert "data:image" not in html
    assert re.fullmatch(
        r"The store of this run could not be read \(manifests/read/\w+\.parquet: not in the store\), so .*",
        found["note"],
    )
    assert found["funnel"] == before["funnel"]
    assert step_of(run, "03-cut")["near_kept"][0]["caption"] is None


@pytest.mark.goal("S-b")
def test_no_secret_of_the_pools_url_reaches_the_report(run: Path) -> None:
    text = (run / "recipe.yaml").read_text()
    url = "https://key:CANARY@example.invalid/{0..1}.parquet?sig=CANARY"
    (run / "recipe.yaml").write_text(re.sub(r"path: .*", f'path: "{url}"', text, count=1))
    html, found = again(run)
    assert "CANARY" not in html and "CANARY" not in json.dumps(found)
    assert found["pool"]["path"] == ["https://example.invalid/{0..1}.parquet"]


def test_the_report_tells_what_the_run_took_and_its_cost_where_prices_are_known(run: Path) -> None:
    times = json.loads((run / "times.json").read_text())
    store = json.loads((run / "run.json").read_text())["datasets"]
    assert set(times["stored_bytes"]) == {key.partition("/")[0] for key in store}
    exported = [path for path in run.rglob("*") if path.is_file() and "store" not in path.parts]
    own = {"times.json", "checksums.sha256", "index.html", "report.json"}
    assert times["written_bytes"] == sum(path.stat().st_size for path in exported if path.name not in own)

    embed = {"stage": "embed", "parts": 1, "rows": 9, "seconds": 4.0, "core_hours": 6.0, "gpu_hours": 1.5}
    embed |= {"phases": {"decode": 3.0}, "bound": "bound by <decoding>"}
    read = {"stage": "read", "parts": 1, "rows": 9, "seconds": 4.0, "core_hours": 2.0, "gpu_hours": 0.0}
    sizes = {"read": 10**9, "embed": 2 * 10**9, "precomputed": 10**9}
    told = {"pool_bytes": 5 * 10**9, "stored_bytes": sizes, "written_bytes": 10**9, "stages": [read, embed]}
    (run / "times.json").write_text(json.dumps(times | told))
    html, found = again(run)
    taken, listed = found["times"]["taken"], found["listed"]
    assert "money" not in taken
    assert taken == {
        "core_hours": 8.0,
        "gpu_hours": 1.5,
        "core_hours_per_million": 8e6 / listed,
        "gpu_hours_per_million": 1.5e6 / listed,
        "pool_bytes": 5 * 10**9,
        "vector_bytes": 3 * 10**9,
        "stored_bytes": 4 * 10**9,
        "written_bytes": 10**9,
    }
    assert "embed: decode 3.0 s; bound by &lt;decoding&gt;" in html
    assert "4 GB, 3 GB" in html

    prices = Prices(
        currency="EUR", cpu_core_hour=0.5, gpu_hour=2, storage_gb_month=0.1, egress_gb=1, per_million_requests=9
    )
    write_report(Root(str(run)), Root(f"{run}/store"), Machine(prices=prices))
    cost = numbers(run)["times"]["taken"]["money"]
    assert cost == {
        **{"currency": "EUR", "total": 12.5, "cores": 4.0, "GPUs": 3.0},
        **{"storage, a month": 0.5, "egress": 5.0, "requests": 0.0},
    }
    page = (run / "report/index.html").read_text("utf-8")
    assert "<bdi>EUR</bdi>: cores 4.00, GPUs 3.00, storage, a month 0.50, egress 5.00</td>" in page

    # Where the pool was not read again, nothing left it.
    (run / "times.json").write_text(json.dumps(times | told | {"stages": [embed]}))
    write_report(Root(str(run)), Root(f"{run}/store"), Machine(prices=prices))
    assert numbers(run)["times"]["taken"]["money"]["egress"] == 0


def test_the_command_rewrites_its_own_lines_of_the_checksums(run: Path) -> None:
    times = json.loads((run / "times.json").read_text())
    (run / "times.json").write_text(json.dumps(times | {"pool_bytes": 7}))
    before = dict(reversed(line.split("  ")) for line in (run / "checksums.sha256").read_text().splitlines())
    assert main([report], [str(run)]) == 0
    after = dict(reversed(line.split("  ")) for line in (run / "checksums.sha256").read_text().splitlines())
    changed = {path for path in before if before[path] != after[path]}
    assert changed == {"report/index.html", "report/report.json"} and before.keys() == after.keys()
    assert list(after) == sorted(after)
    assert all(hashlib.sha256((run / path).read_bytes()).hexdigest() == digest for path, digest in after.items())


def test_a_folder_without_a_finished_run_is_the_users_mistake(
    tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match="no finished run is here"):
        write_report(Root(str(tmp_path)), Root(str(tmp_path)), Machine())
    (run / "checksums.sha256").unlink()
    assert main([report], [str(run)]) == 2
    assert "no finished run is here (no checksums.sha256)" in capsys.readouterr().err


def test_a_part_that_is_gone_is_named(run: Path) -> None:
    next((run / "decisions").glob("*.parquet")).write_bytes(b"PAR1")
    with pytest.raises(Unreadable, match=r"decisions/00000000\.parquet"):
        write_report(Root(str(run)), Root(f"{run}/store"), Machine())


def test_text_loses_what_reorders_it_and_keeps_the_rest() -> None:
    assert shown("a\u202eb\x07c\nd") == "a\N{REPLACEMENT CHARACTER}b c d"
    assert shown("日本語 👩‍🚀 café") == "日本語 👩‍🚀 café"


def test_only_the_start_of_a_caption_is_shown() -> None:
    assert shortened("x" * 160) == "x" * 160
    assert shortened("x" * 161) == "x" * 160 + "…"
    assert shortened(None) is None


def test_what_lies_behind_transparency_is_white_and_what_is_no_image_is_missing() -> None:
    out = io.BytesIO()
    Image.new("RGBA", (400, 100), (0, 0, 0, 0)).save(out, "PNG")
    uri = thumbnail(out.getvalue())
    assert uri is not None
    small = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
    assert small.size == (96, 24) and small.convert("RGB").getpixel((5, 5)) == (255, 255, 255)
    assert thumbnail(b"<html>") is None


def test_rows_are_found_by_ordinal_and_by_uid(written: Path) -> None:
    table = decisions(written)
    uid, key = table.column("uid").to_pylist(), table.column("key").to_pylist()
    last = len(uid) - 1
    rows, by_uid = identify(Root(str(written)), [0, last], [uid[70], "f" * 32])
    assert {row: (i.uid, i.key) for row, i in rows.items()} == {r: (uid[r], key[r]) for r in (0, 70, last)}
    assert by_uid == {uid[70]: [70]}


def test_of_rows_with_one_uid_the_first_two_are_held(tmp_path: Path) -> None:
    (tmp_path / "decisions").mkdir()
    for part in range(2):
        columns = {"uid": ["a" * 32] * 9, "shard": [f"{part}.tar"] * 9, "key": [str(n) for n in range(9)]}
        pq.write_table(pa.table(columns), tmp_path / f"decisions/{part:08d}.parquet")
    rows, by_uid = identify(Root(str(tmp_path)), [12], ["a" * 32])
    assert by_uid == {"a" * 32: [0, 1]}
    assert {row: (i.shard, i.key) for row, i in rows.items()} == {
        0: ("0.tar", "0"),
        1: ("0.tar", "1"),
        12: ("1.tar", "3"),
    }


def test_a_concepts_words_are_those_the_others_lack() -> None:
    cats = ["cat photo", "the black cat photo", "cat photo sleeps", "cat photo and the dog", "rare cat photo"]
    dogs = ["the dog barks", "a brown dog", "dog in the sun", "the dog runs", "a dog and the ball"]
    others = [f"the thing {'photo' if n < 15 else 'number'}{' x' * n}" for n in range(90)]
    cluster = np.array([7] * 5 + [8] * 5 + [9] * 90)
    found = characteristic([*cats, *dogs, *others], cluster, [7, 8])
    assert found == {7: ["cat"], 8: ["dog"]}, "photo and the are everywhere, rare is in one caption"


def test_fine_bins_add_up_whatever_the_range() -> None:
    score = Score("s", None)
    values = np.array([-2.0, -1.0, 0.0, 1.0, 2.0], np.float32)
    np.add.at(score.before, ordered_bits(values) >> np.uint32(32 - FINE_BITS), 1)
    found = score.histogram(4)
    assert (found["low"], found["high"]) == pytest.approx((-2, 2), rel=1e-3)  # the lower end of a fine bin
    assert (found["before"], found["after"]) == ([1, 1, 1, 2], [0] * 4)
    assert Score("s", None).histogram(2)["before"] == [0, 0]


def test_the_random_control_is_the_lowest_hashes_of_those_that_entered() -> None:
    uid = [f"{i:032x}" for i in range(40)]
    number = np.array([0] * 4 + [1] * 16 + [2] * 20)  # one step: 4 rows never entered, 16 dropped, 20 kept
    value = np.arange(40, dtype=np.float64)
    value[39] = np.nan
    found = controls(Drawn(1, number, uid, {"s": value}, {"01-cut": np.arange(40) // 10}), ["01-cut"], 5)["01-cut"]

    def hash_of(row: int) -> bytes:
        return hashlib.sha256(f"5/random-control/01-cut/{uid[row]}".encode()).digest()[:8]

    drawn = sorted(range(4, 40), key=hash_of)[:20]
    assert (found["entered"], found["kept"]) == (36, 20)
    assert found["scores"]["s"]["kept"] == pytest.approx(np.mean(range(20, 39)))
    assert found["scores"]["s"]["random"] == pytest.approx(np.nanmean(value[drawn]))
    assert found["clusters"] == {"entered": 4, "kept": 2, "random": len({row // 10 for row in drawn})}


def test_a_control_over_nothing_has_no_mean() -> None:
    empty = Drawn(1, np.zeros(0, np.int64), [], {"s": np.zeros(0)}, {})
    assert controls(empty, [], 0) == {
        "pool": {"entered": 0, "kept": 0, "scores": {"s": {"entered": None, "kept": None, "random": None}}}
    }
    assert lowest(np.array([3, 1, 2, 1], np.uint64), 2).tolist() == [1, 3]


def test_planted_faults_are_counted_by_the_step_that_caught_them() -> None:
    rows = [  # planted, planted_of, uid, key, step, duplicate_of
        (None, None, "a", "0", None, None),
        ("near_copy", "0", "b", "1", "02-dedup", "a"),  # names its original
        (None, None, "c", "2", "02-dedup", "d"),
        ("near_copy", "2", "d", "3", None, None),  # its original was dropped for it
        ("near_copy", "5", "e", "4", "02-dedup", "g"),  # joined by way of a third row
        (None, None, "f", "5", "02-dedup", "g"),
        (None, None, "g", "6", None, None),
        ("near_copy", "8", "h", "7", "02-dedup", "a"),  # dropped for another
        (None, None, "i", "8", None, None),
        ("near_copy", "8", "j", "9", "03-cut", None),
        ("junk_caption", None, "k", "10", "01-filter", None),
        ("junk_caption", None, "l", "11", "03-cut", None),
        ("mismatched_caption", None, "m", "12", "01-filter", None),
        ("unreadable_image", None, "n", "13", "00-read", None),
        ("something else", None, "o", "14", "01-filter", None),
    ]
    told = Told(*(list(column) for column in zip(*rows, strict=True)))  # type: ignore[arg-type]
    found = caught(told, ["01-filter", "02-dedup", "03-cut"])
    kinds = found["kinds"]
    assert kinds["near_copy"]["by_step"] == {"00-read": 0, "01-filter": 0, "02-dedup": 3, "03-cut": 1}
    assert kinds["near_copy"]["caught"] == 3 and kinds["near_copy"]["recall"] == 3 / 5
    assert kinds["junk_caption"]["recall"] == 1 and kinds["mismatched_caption"]["recall"] == 0
    assert kinds["mismatched_caption"]["by_step"]["01-filter"] == 1
    assert found["unplanted"] == {"00-read": 0, "01-filter": 1, "02-dedup": 2, "03-cut": 0}
    assert found["precision"] == {"00-read": 1, "01-filter": 1 / 3, "02-dedup": 3 / 5, "03-cut": 1 / 2}
    assert list(kinds) == ["near_copy", "mismatched_caption", "junk_caption", "unreadable_image"]


def test_a_run_without_steps_and_one_that_keeps_nothing_have_a_report(tmp_path: Path) -> None:
    pool = datacomp_pool(tmp_path / "pool", 2, 20, 1)
    recipe = datacomp(pool)
    for name, select in (("all", []), ("none", [{"filter": {"min_words": 99}}, *recipe["select"]])):
        run_recipe(recipe | {"select": select}, str(tmp_path / name))
        found = numbers(tmp_path / name)
        assert found["kept"] == (found["listed"] - found["unreadable"] if name == "all" else 0)
        assert found["note"] == "This pool has no images; rows are shown by their captions." or name == "all"


def test_one_pass_looks_at_every_row_once(written: Path) -> None:
    directory = Root(str(written))
    record = load_record(directory)
    listed = record.funnel[0][1]
    drawn = tally(directory, record, listed, [range(0, 30)]).drawn
    assert drawn.stride == 1 and drawn.uid == decisions(written).column("uid").to_pylist()


CHROMIUM = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


def chromium(page: Path, profile: Path, *options: str) -> str:
    """What headless Chromium prints about a page."""
    binary = shutil.which("chromium")
    assert binary, "this test needs Debian's chromium: apt-get install chromium"
    command = [binary, *CHROMIUM, f"--user-data-dir={profile}", *options, page.as_uri()]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout
    except subprocess.TimeoutExpired:  # now and then it hangs before it has looked at the page
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout


@pytest.mark.browser
@pytest.mark.goal("S-d")
def test_in_a_browser_no_hostile_caption_acts_and_the_page_is_drawn(
    written: Path, tmp_path: Path, record_property: pytest.RecordProperty
) -> None:
    trusting = tmp_path / "trusting.html"
    trusting.write_text(f"<title>quiet</title>{HOSTILE[0]}")
    assert "<title>pwned</title>" in chromium(trusting, tmp_path / "a", "--dump-dom"), "the payload must work"
    page = written / "report/index.html"
    dom = chromium(page, tmp_path / "b", "--dump-dom")
    assert "<title>pairsieve: " in dom and not Page(dom).tags & {"script", "iframe"}
    for width in (1200, 400):
        chromium(page, tmp_path / "c", f"--window-size={width},3000", f"--screenshot={tmp_path / 'shot.png'}")
        pixels = np.asarray(Image.open(tmp_path / "shot.png").convert("RGB")).reshape(-1, 3)
        assert len(np.unique(pixels, axis=0)) > 100, "the page is blank"
    record_property("figure", "headless Chromium: the control acts, 0 of the report's captions do")
