from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageEnhance

from pipeline.errors import UserError
from pipeline.held_out import (
    auc,
    caption_stem,
    content_groups,
    held_out_figures,
    hold_out,
    perceptual_hash,
    recall_at,
)

hashes = st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=12)


def drawing(seed: int, side_px: int = 96) -> Image.Image:
    random = np.random.default_rng(seed)
    image = Image.new("RGB", (side_px, side_px), "white")
    draw = ImageDraw.Draw(image)
    for _ in range(6):
        x, y, w, h = (random.uniform(0, 0.7, 4) * side_px).astype(int)
        draw.ellipse((x, y, x + w + 4, y + h + 4), fill=tuple(random.integers(0, 255, 3).tolist()))
    return image


def test_variants_of_a_caption_share_a_stem_and_other_captions_do_not() -> None:
    assert caption_stem("woman singer: dark skin tone") == caption_stem("Man Singer") == "singer"
    assert caption_stem("Slot machine 2") == caption_stem("slotmachine") == "slotmachine"
    assert caption_stem("man: bald") == caption_stem("person: medium-light skin tone, bald") == "bald"
    assert caption_stem("red car") != caption_stem("blue car")
    assert caption_stem("12") == "12" != caption_stem("13")
    assert caption_stem("kiss: person, bald") == "kiss", "what stands behind a colon is a variant"


def test_near_copies_differ_in_a_few_bits_and_other_images_in_many() -> None:
    original = drawing(0)
    value = perceptual_hash(original)
    copies = [
        original.resize((48, 48)),
        ImageEnhance.Brightness(original).enhance(0.9),
        original.convert("P").convert("RGB"),
    ]
    assert max((value ^ perceptual_hash(copy)).bit_count() for copy in copies) <= 4
    assert min((value ^ perceptual_hash(drawing(seed))).bit_count() for seed in range(1, 9)) >= 12
    assert 0 <= value < 2**63, "the constant term, the highest bit, is not compared"


def test_the_hash_is_the_signs_of_cosine_frequencies() -> None:
    ramp = Image.fromarray(np.tile(np.linspace(250, 0, 32).astype(np.uint8), (32, 1)))
    bits = [perceptual_hash(ramp) >> (63 - place) & 1 for place in range(64)]
    assert bits[1] == 1 and bits[3] == 1, "falling from left to right: positive odd frequencies along x"


def test_groups_by_hand() -> None:
    stems = ["cat", "dog", "cat", "car", "bus", "van"]
    assert content_groups(stems, [0, 1 << 40, 1 << 20 | 2**30 - 1, 3 << 40, 2**64 - 1, 2**63 - 1]) == [0, 0, 0, 0, 4, 4]
    assert content_groups(["a", "b"], [0, 0b1111111]) == [0, 1], "seven bits apart"
    spread = sum(1 << bit for bit in (3, 14, 25, 36, 47, 58))
    assert content_groups(["a", "b"], [0, spread]) == [0, 0], "six bits apart, all over the hash"
    assert content_groups(["a", "b"], [0, 0b111111]) == [0, 0], "six bits apart"


@settings(max_examples=60, deadline=None)
@given(hashes, st.integers(0, 8), st.data())
def test_groups_are_the_connected_parts_of_the_definition(
    values: list[int], max_bits: int, data: st.DataObject
) -> None:
    for _ in range(4):  # near neighbours, so that there is something to join
        near = data.draw(st.sampled_from(values))
        for bit in data.draw(st.lists(st.integers(0, 63), max_size=max_bits + 2)):
            near ^= 1 << bit
        values = [*values, near]
    stems = data.draw(st.lists(st.sampled_from("abcdefghijklmnop"), min_size=len(values), max_size=len(values)))
    label = list(range(len(values)))
    for _ in values:
        for i in range(len(values)):
            for j in range(len(values)):
                if stems[i] == stems[j] or (values[i] ^ values[j]).bit_count() <= max_bits:
                    label[i] = min(label[i], label[j])
    assert content_groups(stems, values, max_bits) == label


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 20), min_size=1, max_size=60), st.floats(0, 0.9), st.integers(0, 3))
def test_whole_groups_are_held_out_and_never_too_many(groups: list[int], fraction: float, seed: int) -> None:
    names = [f"{i:03}" for i in range(len(groups))]
    held = hold_out(groups, names, fraction, seed)
    assert held.sum() <= fraction * len(groups)
    inside = {group for group, out in zip(groups, held, strict=True) if out}
    assert inside.isdisjoint(group for group, out in zip(groups, held, strict=True) if not out)


def test_a_caption_on_hundreds_of_images_stays_in_training() -> None:
    groups = [0] * 50 + list(range(1, 151))
    for seed in range(5):
        held = hold_out(groups, [str(i) for i in range(200)], 0.5, seed)
        assert held.sum() == 100 and not held[:50].any()
    assert hold_out(groups, [str(i) for i in range(200)], 0.5, 1).tolist() != held.tolist()


def test_auc_by_hand_counts_ties_half() -> None:
    assert auc(np.array([0.9, 0.5]), np.array([0.1, 0.5, 0.7])) == pytest.approx((3 + 1.5) / 6)
    assert auc(np.array([1.0]), np.array([0.0])) == 1.0


def test_recall_by_hand_counts_ties_against() -> None:
    cosine = np.array([[0.9, 0.1, 0.2], [0.8, 0.5, 0.1], [0.3, 0.3, 0.3]])
    assert [recall_at(cosine, k) for k in (1, 2, 3)] == pytest.approx([1 / 3, 2 / 3, 1])


def test_figures_tell_a_style_apart_from_a_content() -> None:
    # Vectors that know the source but not the pair: across sources that looks good, inside one it does not.
    source_N = np.repeat([0, 1], 40)
    vector_ND = np.eye(2, dtype=np.float32)[source_N]
    sources = ["ab"[i] for i in source_N]
    style = held_out_figures(vector_ND, vector_ND, sources, list(range(80)))
    assert style.auc_inside == 0.5 and style.auc_across > 0.7
    assert style.auc_by_source == {"a": 0.5, "b": 0.5} and (style.pairs, style.groups) == (80, 80)

    content = held_out_figures(np.eye(80, dtype=np.float32), np.eye(80, dtype=np.float32), sources, list(range(80)))
    assert (content.auc_inside, content.auc_across, content.recall_1) == (1.0, 1.0, 1.0)


def test_a_caption_of_the_same_group_is_no_mismatch() -> None:
    vector_ND = np.eye(2, dtype=np.float32)[[0, 0, 1, 1]]
    figures = held_out_figures(vector_ND, vector_ND, ["a"] * 4, [0, 0, 2, 2])
    assert (figures.auc_inside, figures.recall_pool, figures.recall_1) == (1.0, 2, 1.0)


def test_too_few_held_out_pairs_are_a_clear_mistake() -> None:
    vector_ND = np.eye(2, dtype=np.float32)
    with pytest.raises(UserError, match=r"recipe\.data\.held_out: too few held-out pairs"):
        held_out_figures(vector_ND, vector_ND, ["a", "b"], [0, 1])
