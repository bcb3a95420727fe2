"""Decoding: the same pixels as Pillow, and hostile or damaged bytes become a problem, fast and in little memory."""

from __future__ import annotations

import io
import random
import resource
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from PIL.ImageFile import ImageFile

from pipeline.images import (
    MAX_BYTES,
    MAX_PIXELS,
    MAX_SCAN_PIXELS,
    MIN_SCAN_BYTES,
    Decoded,
    Undecodable,
    decode,
    decode_rgb,
    header_px,
    scan_count,
    size_px,
)
from tests.corpus_samples import black_png, chunk, jpeg_with_size, picture, png, scan_bomb, stored

GOOD = {
    "jpeg": stored(picture(40, 30), "JPEG"),
    "progressive jpeg": stored(picture(40, 30), "JPEG", progressive=True),
    "jpeg of all its chroma": stored(picture(40, 30), "JPEG", subsampling=0),
    "jpeg of half its chroma": stored(picture(40, 30), "JPEG", subsampling=1),
    "jpeg that stores rgb": stored(picture(40, 30), "JPEG", subsampling=0, keep_rgb=True),
    "jpeg with restarts": stored(picture(40, 30), "JPEG", restart_marker_blocks=2),
    "grey jpeg": stored(picture(40, 30, "L"), "JPEG"),
    "cmyk jpeg": stored(picture(40, 30, "CMYK"), "JPEG"),
    "png": stored(picture(40, 30), "PNG"),
    "palette png": stored(picture(40, 30, "P"), "PNG", transparency=bytes(range(256))),
    "alpha png": stored(picture(40, 30, "RGBA"), "PNG"),
    "16 bit png": stored(Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40) * 50), "PNG"),
    "1 bit png": stored(picture(40, 30, "1"), "PNG"),
    "webp": stored(picture(40, 30), "WEBP"),
    "alpha webp": stored(picture(40, 30, "RGBA"), "WEBP", lossless=True),
    "animated webp": stored(
        picture(40, 30), "WEBP", save_all=True, append_images=[picture(40, 30, "L").convert("RGB")]
    ),
    "gif": stored(picture(40, 30), "GIF"),
    "animated gif": stored(picture(40, 30), "GIF", save_all=True, append_images=[Image.new("RGB", (40, 30))]),
}


@pytest.mark.parametrize("name", GOOD)
def test_a_good_image_decodes_to_the_pixels_that_pillow_gives(name: str) -> None:
    image = decode(GOOD[name])
    assert isinstance(image, Image.Image)
    reference = Image.open(io.BytesIO(GOOD[name]))
    assert image.size == (40, 30)
    assert image.mode == reference.mode
    assert np.array_equal(np.asarray(image), np.asarray(reference))
    assert_same(decode_rgb(GOOD[name]), image)


def assert_same(found: Decoded | Undecodable, expected: Image.Image | Undecodable) -> None:
    """What decode_rgb found is what decode did: the same problem, or the same pixels."""
    if isinstance(found, Undecodable) or isinstance(expected, Undecodable):
        assert found == expected
        return
    mode = "RGB" if isinstance(found, np.ndarray) else found.mode
    assert (mode, size_px(found)) == (expected.mode, expected.size)
    assert np.array_equal(np.asarray(found), np.asarray(expected))


@pytest.mark.parametrize("name", GOOD)
def test_levels_without_an_image_are_those_of_rgb_jpegs(name: str) -> None:
    rgb_jpeg = "jpeg" in name and name not in ("grey jpeg", "cmyk jpeg")
    found = decode_rgb(GOOD[name])
    assert isinstance(found, np.ndarray) == rgb_jpeg
    if isinstance(found, np.ndarray):
        assert (found.shape, found.dtype, found.flags.writeable) == ((30, 40, 3), np.uint8, True)


@pytest.mark.parametrize("name", GOOD)
def test_the_header_gives_width_before_height(name: str) -> None:
    assert header_px(GOOD[name]) == (40, 30)


@pytest.mark.parametrize("size", [(1, 1), (1, 60000), (60000, 1)])
def test_extreme_shapes_decode(size: tuple[int, int]) -> None:
    data = stored(Image.new("RGB", size), "JPEG")
    image = decode(data)
    assert isinstance(image, Image.Image)
    assert image.size == size == header_px(data)
    assert_same(decode_rgb(data), image)


TOO_LARGE = {
    "1-bit png of 13000 x 13000, for which Pillow only warns": black_png(13000),
    "png that declares 20000 x 20000": png(20000, 20000),
    "png that declares 2^31 - 1": png(2**31 - 1, 2**31 - 1),
    "jpeg that declares 65500 x 65500": jpeg_with_size(65500, 65500),
    "gif that declares 65535 x 65535": b"GIF89a" + struct.pack("<HH", 65535, 65535) + GOOD["gif"][10:],
    "webp of 9000 x 9000": stored(Image.new("RGB", (9000, 9000)), "WEBP", quality=1, method=0),
    "jpeg of 8000 scans": scan_bomb(512, 8000),
    "more bytes than are read": GOOD["jpeg"] + bytes(MAX_BYTES),
}


@pytest.mark.goal("S-g")
@pytest.mark.parametrize("decoder", [decode, decode_rgb])
@pytest.mark.parametrize("name", TOO_LARGE)
def test_a_bomb_is_too_large_within_a_second_and_a_gibibyte(
    name: str, decoder: Callable[[bytes], Decoded | Undecodable]
) -> None:
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    found = decoder(TOO_LARGE[name])
    assert isinstance(found, Undecodable)
    assert found.reason == "image_too_large"
    assert time.process_time() - start < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib < 1 << 20


@pytest.mark.goal("S-g")
def test_the_pixel_cap_is_inclusive() -> None:
    inside, outside = png(MAX_PIXELS // 1000, 1000), png(MAX_PIXELS // 1000 + 1, 1000)
    found = decode(inside)
    assert isinstance(found, Undecodable) and found.reason == "unreadable_image"
    assert decode(outside) == Undecodable("image_too_large", f"64001 x 1000 px, at most {MAX_PIXELS} are decoded")


def test_scans_are_counted_where_the_bytes_could_hold_too_many() -> None:
    side, scans = 512, MAX_SCAN_PIXELS // 512**2 + 1
    bomb = scan_bomb(side, scans)
    extra = scan_count(bomb) - scans
    assert bomb.rindex(b"\xff\xd9") - bomb.rindex(b"\xff\xda") >= MIN_SCAN_BYTES
    assert decode(bomb) == Undecodable("image_too_large", f"{side} x {side} px in {scans + extra} scans")
    assert isinstance(decode(scan_bomb(side, 40)), Image.Image)


@given(st.lists(st.sampled_from([b"\xff\xda", b"\xff", b"\xda", b"\0"]), min_size=1, max_size=40).map(b"".join))
def test_scans_are_counted_as_by_bytes_count(data: bytes) -> None:
    assert scan_count(data) == data.count(b"\xff\xda")


UNREADABLE = {
    "nothing": b"",
    "text": b"<html>404</html>",
    "magic only": b"\xff\xd8\xff",
    "jpeg cut at half": GOOD["jpeg"][: len(GOOD["jpeg"]) // 2],
    "png cut at half": GOOD["png"][: len(GOOD["png"]) // 2],
    "webp cut at half": GOOD["webp"][: len(GOOD["webp"]) // 2],
    "gif cut at half": GOOD["gif"][: len(GOOD["gif"]) // 2],
    "png of 0 x 0": png(0, 0),
    "jpeg of 0 x 0": jpeg_with_size(0, 0),
    "png with a wrong checksum": GOOD["png"][:29] + b"\0\0\0\0" + GOOD["png"][33:],
    "png with 64 MB of text": png(8, 8, 8, extra=chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(64 << 20), 1))),
    "png whose profile unpacks to 64 MB": GOOD["png"][:33]
    + chunk(b"iCCP", b"p\0\0" + zlib.compress(bytes(64 << 20), 1))
    + GOOD["png"][33:],
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n",
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>",
    "bmp": stored(picture(4, 4), "BMP"),
    "tiff": stored(picture(4, 4), "TIFF"),
    "ico": stored(picture(16, 16), "ICO"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_damaged_or_foreign_bytes_are_unreadable(name: str) -> None:
    found = decode(UNREADABLE[name])
    assert isinstance(found, Undecodable)
    assert found.reason == "unreadable_image"
    assert found.detail and "\n" not in found.detail
    assert decode_rgb(UNREADABLE[name]) == found


def test_the_header_of_no_image_is_none() -> None:
    assert header_px(b"") is None
    assert header_px(UNREADABLE["eps"]) is None
    assert header_px(UNREADABLE["png of 0 x 0"]) is None


def test_damaged_exif_does_not_matter_and_is_not_remarked_upon(tmp_path: Path) -> None:
    exif = b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + bytes(range(200))
    segment = b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif
    data = GOOD["jpeg"]
    at = data.index(b"\xff\xdb")
    (tmp_path / "exif.jpg").write_bytes(data[:2] + segment + data[at:])
    code = "import sys; from pipeline.images import decode; print(decode(open(sys.argv[1], 'rb').read()).size)"
    ran = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "exif.jpg")],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        check=True,
    )
    assert (ran.stdout, ran.stderr) == ("(40, 30)\n", "")


def test_no_byte_flip_or_cut_ever_raises() -> None:
    draw = random.Random(7)
    for data in GOOD.values():
        for _ in range(60):
            damaged = bytearray(data[: draw.randrange(len(data) + 1)] if draw.random() < 0.3 else data)
            for _ in range(draw.randrange(1, 6)):
                if damaged:
                    damaged[draw.randrange(len(damaged))] = draw.randrange(256)
            header_px(bytes(damaged))
            found = decode(bytes(damaged))
            assert isinstance(found, Image.Image | Undecodable)
            assert_same(decode_rgb(bytes(damaged)), found)


def test_a_fault_that_pillow_reads_over_is_read_over() -> None:
    """libjpeg warns of each of these; simplejpeg refuses them, so Pillow's pixels count."""
    data = GOOD["jpeg"]
    for at in (data.index(b"\xff\xdb"), len(data) - 2):
        damaged = data[:at] + bytes(9) + data[at:]
        found = decode(damaged)
        assert isinstance(found, Image.Image)
        assert isinstance(decode_rgb(damaged), Image.Image)
        assert_same(decode_rgb(damaged), found)


@pytest.mark.parametrize("decoder", [decode, decode_rgb])
def test_threads_decode_the_same(decoder: Callable[[bytes], Decoded | Undecodable]) -> None:
    images = list(GOOD.values()) * 8
    with ThreadPoolExecutor(8) as threads:
        together = list(threads.map(decoder, images))
    for data, image in zip(images, together, strict=True):
        assert not isinstance(image, Undecodable)
        assert_same(image, decode(data))


def test_a_scaled_decode_keeps_the_sides_asked_for() -> None:
    data = stored(picture(900, 500), "JPEG")
    sizes = {px: decode(data, at_least_px=px) for px in (600, 250, 224, 100, 32)}
    assert {px: image.size for px, image in sizes.items() if isinstance(image, ImageFile)} == {
        600: (900, 500),
        250: (450, 250),
        224: (450, 250),
        100: (225, 125),
        32: (113, 63),
    }
    for px, image in sizes.items():
        levels = decode_rgb(data, at_least_px=px)
        assert isinstance(levels, np.ndarray)
        assert_same(levels, image)
    png_image = decode(stored(picture(900, 500), "PNG"), at_least_px=32)
    assert isinstance(png_image, Image.Image) and png_image.size == (900, 500)
