"""Stored image bytes in; a decoded image out, or the problem that says why there is none.

Only JPEG, PNG, WEBP and GIF (its first frame) are opened, each by its own decoder, chosen by the first bytes: nothing
else that Pillow could open is reachable from here. Size is judged from the header, before pixels are decoded. Pillow
says what an image is and whether it can be used; simplejpeg only makes the same pixels of the same JPEG sooner.
"""

from __future__ import annotations

import struct
import warnings
import zlib
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO

import numpy as np
from PIL import Image
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile
from simplejpeg import decode_jpeg

from pipeline.vectors import Uint8s

MAX_PIXELS = 64_000_000
"""Largest image that is decoded: 256 MB in memory."""

MAX_BYTES = 64 * 1024 * 1024
"""Largest stored image that is decoded."""

MAX_SCAN_PIXELS = 10 * MAX_PIXELS
"""Pixels times scans of a progressive JPEG (usual: 10 scans): a scan of a few bytes costs a pass over all pixels."""

MIN_SCAN_BYTES = 10
"""Of a JPEG's scan: marker and header of one component. Scans are counted only where the bytes could hold too many."""

START_OF_SCAN = b"\xff\xda"

# What Pillow raises on damaged input; UserWarning only where the caller turned warnings into errors.
FAULTS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    MemoryError,
    AttributeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    UserWarning,
)

Decoded = Uint8s | Image.Image
"""The levels of an RGB image, shape (height, width, 3), or a Pillow image of any mode."""

# Pillow's remarks about the EXIF of single samples would flood the log of a run.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")


@dataclass(frozen=True)
class Undecodable:
    """Why an image cannot be used.

    Attributes:
        reason: `unreadable_image` or `image_too_large`.
        detail: one line for people.
    """

    reason: str
    detail: str


def header_px(data: bytes) -> tuple[int, int] | None:
    """Width and height in px as the header states them, both at least 1; None where there is no readable header.

    Never raises, and never decodes a pixel.
    """
    try:
        return _opened(data).size
    except FAULTS:
        return None


def decode(data: bytes, at_least_px: int | None = None) -> Image.Image | Undecodable:
    """Decode a stored image, whole or not at all.

    The image keeps its own mode (palette, alpha, CMYK, 16 bit): open_clip's transform resizes first and converts to
    RGB after, and so does `encode.frame`. Others call `.convert("RGB")`.

    Args:
        data: the stored bytes.
        at_least_px: where given, a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size, as long as both sides keep
            this many px. Faster, and not the same pixels.

    Returns:
        A loaded Pillow image of 1 to MAX_PIXELS px; or the problem. Never raises.
    """
    return _loaded(_judged(data, at_least_px))


def decode_rgb(data: bytes, at_least_px: int | None = None) -> Decoded | Undecodable:
    """`decode`, but of an RGB JPEG only its levels, which are the same, in three fifths of the time at 256 px.

    simplejpeg writes three bytes a pixel at once, where Pillow writes four, by way of rows.

    Args:
        data, at_least_px: as for `decode`.

    Returns:
        uint8, shape (height, width, 3), of a JPEG without a fault whose mode would be RGB; else what `decode` returns.
        Never raises.
    """
    image = _judged(data, at_least_px)
    if isinstance(image, JpegImageFile) and image.mode == "RGB":
        width, height = image.size
        with suppress(ValueError, RuntimeError, MemoryError):  # damaged, or of a rare kind: Pillow decides
            # A buffer, so that a header which the two libraries read differently cannot cost more than was judged.
            levels = np.empty((height, width, 3), np.uint8)
            found: Uint8s = decode_jpeg(data, "RGB", min_height=height, min_width=width, buffer=levels, strict=True)
            return found
    return _loaded(image)


def _judged(data: bytes, at_least_px: int | None) -> ImageFile | Undecodable:
    """The image with its header read, but not yet its pixels; or why those are not to be decoded."""
    if len(data) > MAX_BYTES:
        return Undecodable("image_too_large", f"{len(data)} bytes, at most {MAX_BYTES} are decoded")
    try:
        image = _opened(data)
        width, height = image.size
        if width * height > MAX_PIXELS:
            return Undecodable("image_too_large", f"{width} x {height} px, at most {MAX_PIXELS} are decoded")
        if isinstance(image, JpegImageFile):
            most = MAX_SCAN_PIXELS // (width * height)
            if len(data) // MIN_SCAN_BYTES > most and (scans := scan_count(data)) > most:
                return Undecodable("image_too_large", f"{width} x {height} px in {scans} scans")
            if at_least_px is not None:
                image.draft(None, (at_least_px, at_least_px))
    except FAULTS as error:
        return _unreadable(error)
    return image


def _loaded(image: ImageFile | Undecodable) -> ImageFile | Undecodable:
    """The image with its pixels decoded."""
    if isinstance(image, Undecodable):
        return image
    try:
        image.load()
    except FAULTS as error:
        return _unreadable(error)
    return image


def _unreadable(error: Exception) -> Undecodable:
    return Undecodable("unreadable_image", f"{type(error).__name__}: {error}"[:200])


def size_px(image: Decoded) -> tuple[int, int]:
    """Width and height, px."""
    return image.size if isinstance(image, Image.Image) else (image.shape[1], image.shape[0])


def scan_count(data: bytes) -> int:
    """Times that START_OF_SCAN occurs in one byte or more: even and odd places apart, 7 times as fast as `count`."""
    marker = np.frombuffer(START_OF_SCAN, np.uint16)
    pairs = (np.frombuffer(data, np.uint16, (len(data) - offset) // 2, offset) for offset in (0, 1))
    return sum(int(np.count_nonzero(pair == marker)) for pair in pairs)


def _opened(data: bytes) -> ImageFile:
    """The image with its header read. Raises one of FAULTS; ImageFile itself refuses a side of 0 px."""
    stream = BytesIO(data)
    if data.startswith(b"\xff\xd8\xff"):
        return JpegImageFile(stream)
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return PngImageFile(stream)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return WebPImageFile(stream)
    if data.startswith((b"GIF87a", b"GIF89a")):
        return GifImageFile(stream)
    raise SyntaxError("not a JPEG, PNG, WEBP or GIF image" if data else "0 bytes")
