"""What `make bench` says of what it measured; the measuring itself is no test."""

import json
import math
import sys
import xml.etree.ElementTree as ET
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest

from jobs.bench import BENCHES, bench, line, save, saved
from jobs.benches.measure import Row, compare, paired, within
from jobs.benches.picture import picture
from jobs.entry import DONE, WRONG, main


def row(ratio: float, target: float = 1.0, name: str = "copy 2 GB") -> Row:
    return Row(name, "cp", ratio, target, "bytes/s", 5.0, 4.0, 0.9 * ratio, 1.1 * ratio, 5)


def test_the_ratio_is_the_median_of_the_pairs_not_the_ratio_of_the_medians():
    found = paired("n", "a", 2.0, "rows/s", [(10, 5), (30, 10), (8, 8)])
    assert (found.ratio, found.low, found.high, found.runs) == (2.0, 1.0, 3.0, 3)
    assert (found.ours, found.theirs) == (10, 8)


def test_a_cost_within_its_limit_has_a_ratio_above_one():
    found = within("resume", 5.0, "s", [2.0, 2.5, 10.0])
    assert (found.ratio, found.low, found.high, found.target) == (2.0, 0.5, 2.5, 1.0)
    assert (found.ours, found.theirs) == (2.5, 5.0)


def test_both_are_done_in_turn_after_a_run_that_does_not_count():
    calls = []
    found = compare("n", "a", 1.0, "calls/s", 1, lambda: calls.append("o"), lambda: calls.append("t"), runs=3)
    assert "".join(calls) == "ot" + "ot" + "to" + "ot"
    assert found.runs == 3 and math.isfinite(found.ratio)


def test_a_line_says_whether_the_target_was_reached():
    assert line(row(1.0)).startswith("ok     1.00 (target 1, 0.90..1.10 of 5)  copy 2 GB | cp: 5 to 4 bytes/s")
    assert line(row(0.99)).startswith("MISS   0.99")


def test_the_picture_is_valid_and_its_bars_end_at_the_target_or_beyond():
    svg = ET.fromstring(picture([row(2.0), row(0.5, name="a < b & c"), row(1e9), row(1e-9)]))
    space = {"s": "http://www.w3.org/2000/svg"}
    middle = float(svg.find("s:line", space).get("x1"))
    groups = svg.findall("s:g", space)
    assert groups[1].find("s:title", space).text == "a < b & c | cp"
    bars = [(float(bar.get("x")), float(bar.get("width"))) for bar in svg.findall("s:g/s:rect", space)]
    assert bars[0][0] == bars[2][0] == middle, "what reached its target goes to the right"
    assert all(abs(x + width - middle) < 0.2 for x, width in (bars[1], bars[3]))
    assert all(x > 0 and x + width < float(svg.get("width")) for x, width in bars)


@pytest.mark.parametrize("name", BENCHES)
def test_every_bench_is_a_module_that_measures(name):
    # Read, not imported: their peers are installed by `make bench` alone.
    spec = find_spec(f"jobs.benches.{name}")
    assert "def measure(scratch: Path) -> Iterator[Row]:" in Path(spec.origin).read_text()


def test_a_bench_that_there_is_not_is_named(tmp_path, capsys):
    assert main([bench], ["decod", "--out", str(tmp_path)]) == WRONG
    assert "'decod' is no bench; did you mean 'decode'?" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_rows_of_benches_that_are_not_measured_stay(tmp_path, monkeypatch):
    save(tmp_path, {"embed": [row(1.0)], "copy": [row(1.1), row(1.2)], "decode": [row(1.3)]})
    monkeypatch.setitem(sys.modules, "jobs.benches.copy", SimpleNamespace(measure=lambda scratch: iter([row(3.0)])))
    assert main([bench], ["copy", "--out", str(tmp_path)]) == DONE
    rows = json.loads((tmp_path / "bench.json").read_text())
    assert [(found["bench"], found["ratio"]) for found in rows] == [("decode", 1.3), ("embed", 1.0), ("copy", 3.0)]
    assert saved(tmp_path)["copy"] == [row(3.0)]
    assert len(ET.parse(tmp_path / "bench.svg").findall("{http://www.w3.org/2000/svg}g")) == 3


def test_rows_that_do_not_tell_their_bench_are_measured_anew(tmp_path):
    (tmp_path / "bench.json").write_text('[{"name": "copy 2 GB", "ratio": 1}]')
    assert saved(tmp_path) == {}
