from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image, ImageDraw

from pipeline import tiny
from pipeline.encode import resolve
from pipeline.held_out import auc

MAX_BYTES = 16 * 1024 * 1024


def drawings() -> dict[str, Image.Image]:
    """Simple signs as an icon set draws them, and what a person would call them."""
    drawn: dict[str, Image.Image] = {}

    def canvas(caption: str) -> ImageDraw.ImageDraw:
        drawn[caption] = Image.new("RGB", (128, 128), "white")
        return ImageDraw.Draw(drawn[caption])

    canvas("red circle").ellipse((8, 8, 120, 120), fill=(221, 46, 68))
    canvas("green square").rectangle((12, 12, 116, 116), fill=(94, 157, 52))
    canvas("blue diamond").polygon([(64, 6), (122, 64), (64, 122), (6, 64)], fill=(58, 110, 210))
    star = [
        (64 + r * np.sin(a), 64 - r * np.cos(a)) for a, r in zip(np.arange(10) * np.pi / 5, [58, 24] * 5, strict=True)
    ]
    canvas("yellow star").polygon([(float(x), float(y)) for x, y in star], fill=(255, 200, 40))
    heart = canvas("red heart")
    heart.ellipse((10, 16, 68, 74), fill=(221, 46, 68))
    heart.ellipse((60, 16, 118, 74), fill=(221, 46, 68))
    heart.polygon([(14, 58), (114, 58), (64, 118)], fill=(221, 46, 68))
    face = canvas("smiling face")
    face.ellipse((6, 6, 122, 122), fill=(255, 204, 77))
    face.ellipse((36, 38, 50, 58), fill=(80, 50, 20))
    face.ellipse((78, 38, 92, 58), fill=(80, 50, 20))
    face.arc((34, 40, 94, 100), 20, 160, fill=(80, 50, 20), width=6)
    flag = canvas("flag: France")
    for left, colour in ((8, (0, 85, 164)), (45, (250, 250, 250)), (83, (239, 65, 53))):
        flag.rectangle((left, 28, left + 37, 100), fill=colour)
    arrow = canvas("right arrow")
    arrow.rectangle((10, 52, 74, 76), fill="black")
    arrow.polygon([(70, 26), (120, 64), (70, 102)], fill="black")
    return drawn


@dataclass(frozen=True)
class Loaded:
    """The model as open_clip's own calls give it, and the connections that were made on the way."""

    model: Any
    transform: Callable[[Image.Image], torch.Tensor]
    tokenizer: Any
    connections: list[str]

    def vectors(self, images: list[Image.Image], captions: list[str]) -> tuple[np.ndarray, np.ndarray]:
        with torch.no_grad():
            image_ND = self.model.encode_image(torch.stack([self.transform(image) for image in images]), normalize=True)
            text_ND = self.model.encode_text(self.tokenizer(captions), normalize=True)
        return image_ND.double().numpy(), text_ND.double().numpy()


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    connections: list[str] = []

    def notice(event: str, args: tuple[Any, ...]) -> None:
        if event in ("socket.connect", "socket.getaddrinfo"):
            connections.append(f"{event} {args}")

    sys.addaudithook(notice)
    open_clip.add_model_config(tiny.CONFIG)
    model, _, transform = open_clip.create_model_and_transforms(tiny.ARCH, pretrained=str(tiny.WEIGHTS))
    tokenizer = open_clip.get_tokenizer(tiny.ARCH, bpe_path=str(tiny.BPE))
    return Loaded(model.eval(), transform, tokenizer, list(connections))


def test_the_files_are_small_and_need_no_pickle() -> None:
    files = [tiny.CONFIG, tiny.WEIGHTS, tiny.BPE]
    assert sum(file.stat().st_size for file in files) <= MAX_BYTES
    assert tiny.WEIGHTS.suffix == ".safetensors" and tiny.CONFIG.stem == tiny.ARCH


def test_open_clip_loads_it_like_any_other_and_without_a_network(loaded: Loaded) -> None:
    config = json.loads(tiny.CONFIG.read_text())
    assert loaded.connections == []
    assert loaded.tokenizer.vocab_size == config["text_cfg"]["vocab_size"]
    assert loaded.tokenizer(["a"]).shape == (1, config["text_cfg"]["context_length"])
    assert all(bool(torch.isfinite(tensor).all()) for tensor in loaded.model.state_dict().values())


def test_its_vectors_are_unit_and_of_the_stated_width(loaded: Loaded) -> None:
    image_ND, text_ND = loaded.vectors([Image.new("RGB", (50, 200), "red"), Image.new("L", (1, 1))], ["", "a red wall"])
    assert image_ND.shape == text_ND.shape == (2, json.loads(tiny.CONFIG.read_text())["embed_dim"])
    assert np.allclose(np.linalg.norm([*image_ND, *text_ND], axis=1), 1, atol=1e-5)


def test_the_tokenizer_gives_back_any_text(loaded: Loaded) -> None:
    for text in ("a cat on a mat", "señor 猫 🐈", "xyzzyqwk"):
        assert loaded.tokenizer.decode(loaded.tokenizer.encode(text)).strip() == text


def test_a_long_caption_is_cut_and_still_ends(loaded: Loaded) -> None:
    (tokens,) = loaded.tokenizer(["word " * 500])
    assert tokens[0] == loaded.tokenizer.sot_token_id and tokens[-1] == loaded.tokenizer.eot_token_id


def test_matched_pairs_score_above_mismatched(loaded: Loaded) -> None:
    drawn = drawings()
    image_ND, text_ND = loaded.vectors(list(drawn.values()), list(drawn))
    cos_NN = image_ND @ text_ND.T
    matched_N, mismatched_M = cos_NN.diagonal(), cos_NN[~np.eye(len(drawn), dtype=bool)]
    assert matched_N.mean() - mismatched_M.mean() > 0.2
    assert auc(matched_N, mismatched_M) >= 0.85


def test_the_card_names_every_source_with_its_licence_and_the_held_out_figures() -> None:
    card = (tiny.WEIGHTS.parent / "README.md").read_text("utf-8")
    for source in ("openclipart", "openmoji", "twemoji", "noto", "fluent-emoji-flat", "fxemoji", "endless-sky"):
        assert f"| {source} | " in card
    assert "CC-BY-SA-4.0" in card and "Apache-2.0" in card and "recall@5" in card
    assert "| gimp-help-en |" not in card, "GFDL: never trained on"


def test_the_product_finds_it_by_its_name() -> None:
    weights = resolve(None, "tiny")
    assert (weights.arch, weights.path) == (tiny.ARCH, str(tiny.WEIGHTS))
