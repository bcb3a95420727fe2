"""What bounds embedding, by hand."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.costs import PHASES, bound, verdict


@pytest.mark.parametrize(
    ("seconds", "workers", "decoders", "found"),
    [
        # In line, 2 + 9 + 4 + 1 + 1: decoding is longest; 9 s hide behind 2 + 4 s once two cores do them.
        ({"read": 2, "decode": 9, "image": 4, "text": 1, "write": 1}, 1, 0, ("decoding", 2)),
        # One core beside the worker takes 9 s where the worker takes 6: one more hides it. The same for each of three.
        ({"read": 2, "decode": 9, "image": 4, "text": 1, "write": 1}, 1, 1, ("decoding", 1)),
        ({"read": 2, "decode": 9, "image": 4, "text": 1, "write": 1}, 3, 1, ("decoding", 3)),
        # Two cores take 4.5 s, in the shadow of 6: the towers are longest, and no core helps.
        ({"read": 2, "decode": 9, "image": 4, "text": 1, "write": 1}, 1, 2, ("forward passes", 0)),
        ({"read": 7, "decode": 9, "image": 4, "text": 1, "write": 1}, 1, 2, ("reading", 0)),
        ({"read": 1, "decode": 1, "image": 4, "text": 1, "write": 8}, 1, 2, ("writing", 0)),
        # Reading and the image tower are in the shadow of decoding, the captions are not.
        ({"read": 5, "decode": 14, "image": 1, "text": 8, "write": 0}, 1, 2, ("forward passes", 1)),
        ({"read": 5, "decode": 14, "image": 1, "text": 6, "write": 0}, 1, 2, ("decoding", 1)),
        ({"image": 4}, 2, 3, ("forward passes", 0)),
        ({"decode": 4}, 2, 0, ("decoding", 2)),
        ({}, 1, 0, ("reading", 0)),
    ],
)
def test_worked_by_hand(seconds: Mapping[str, float], workers: int, decoders: int, found: tuple[str, int]) -> None:
    assert bound(seconds, workers, decoders) == found


@given(st.tuples(*[st.floats(0.01, 100)] * len(PHASES)), st.integers(1, 9), st.integers(0, 9))
def test_with_the_cores_it_asks_for_no_more_are_needed_and_decoding_no_longer_bounds(
    spent: tuple[float, ...], workers: int, decoders: int
) -> None:
    seconds = dict(zip(PHASES, spent, strict=True))
    _, more = bound(seconds, workers, decoders)
    name, still = bound(seconds, workers, decoders + more // workers)
    assert more % workers == 0
    assert still == 0
    assert name != "decoding"


def test_a_verdict_is_a_line() -> None:
    assert verdict({"decode": 9, "image": 4}, 1, 1) == "bound by decoding; 2 more cores to decode would help"
    assert verdict({"decode": 5, "image": 4}, 1, 1) == "bound by decoding; 1 more core to decode would help"
    assert verdict({"decode": 3, "image": 4}, 1, 1) == (
        "bound by forward passes; more cores to decode would not help, one more worker would make it 2 times as fast"
    )
    assert verdict({"decode": 3, "image": 4}, 3, 1).endswith("one more worker would make it 1.33 times as fast")
