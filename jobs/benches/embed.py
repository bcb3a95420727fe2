"""Tars on disk to float16 vectors on disk, by the embed stage of a run: against its own parts, and the usual stack.

The limit is one image decoded, one image forward and one caption forward after the other, each rate measured alone.
The usual stack is webdataset, torch's DataLoader and open_clip, for each length of captions at the best workers and
batch of those tried. Weights of ViT-B-32 are random: its speed does not depend on them. Pictures are those of the
decode bench, 341 x 256 px.
"""

from __future__ import annotations

import random
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from itertools import product
from pathlib import Path

import emoji
import numpy as np
import open_clip
import pyarrow as pa
import torch
from safetensors.torch import save_file
from torch.utils.data import DataLoader
from webdataset import WebDataset

from jobs.benches.decode import jpeg, photograph
from jobs.benches.measure import RUNS, Row, compare, paired, seconds
from pipeline.curate import curate
from pipeline.embed import embed, framer
from pipeline.encode import DTYPE, Encoder, numerics, resolve
from pipeline.formats import webdataset
from pipeline.machine import Machine
from pipeline.parts import to_parquet
from pipeline.pool import Pool, list_units
from pipeline.ray_executor import RayExecutor
from pipeline.recipe import recipe_of
from pipeline.run import Run
from pipeline.storage import Root, UnitFiles
from pipeline.vectors import Uint8s

ARCH = "ViT-B-32"
PAIRS, LIMIT_PAIRS, TINY_PAIRS, TRY_PAIRS = 256, 512, 2048, 128
"""Beside the usual stack; beside its own passes, which are close: twice as many; of `tiny`; for the stack's best."""
SHARDS = 2
SHORT, LONG = (1, 5), (8, 16)
"""Words of a caption, fewest and most: clip art's, and LAION's."""

USUAL = {SHORT: 1.5, LONG: 1.35}
TWO_THREADS = Machine(device="cpu", threads=2, image_batch=32, text_batch=128)
TWO_WORKERS = Machine(device="cpu", threads=1, workers=2, image_batch=32, text_batch=128)
PEER_TRIES = tuple(product((0, 1, 2), (32, 64, 128)))
"""Workers of the DataLoader, and batch."""


@dataclass(frozen=True)
class Tars:
    """Pairs, and the same in tars."""

    folder: Path
    images: list[bytes]
    captions: list[str]

    def write(self) -> Tars:
        self.folder.mkdir()
        for shard in range(SHARDS):
            with tarfile.open(self.folder / f"{shard:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
                for row in range(shard, len(self.images), SHARDS):
                    for suffix, data in (("jpg", self.images[row]), ("txt", self.captions[row].encode())):
                        member = tarfile.TarInfo(f"{row:08d}.{suffix}")
                        member.size = len(data)
                        tar.addfile(member, BytesIO(data))
        return self


@dataclass(frozen=True)
class TarSamples:
    """What the embed stage reads of the samples of one tar (stage.Rows)."""

    samples: pa.Table

    def table(self) -> pa.Table:
        return self.samples


def measure(scratch: Path) -> Iterator[Row]:
    """Pairs a second."""
    yield from tiny(scratch)
    yield from vit(scratch)


def tiny(scratch: Path) -> Iterator[Row]:
    """The shipped model, with the pool's captions."""
    pool = Tars(scratch / "tiny", pictures(TINY_PAIRS), captions(TINY_PAIRS, SHORT)).write()
    yield limit_row("tiny", pool, scratch, {"weights": "tiny"}, 0.85)
    yield paired(
        "embed: tiny, 2 Ray workers, model loading included", "200 a second", 1, "pairs/s", by_ray(pool, scratch)
    )


def by_ray(pool: Tars, scratch: Path) -> list[tuple[float, float]]:
    """Rates of the embed stage of whole runs, each beside the 200 a second that are asked for."""
    recipe = recipe_of(
        {
            "pool": {"format": "webdataset", "path": str(pool.folder)},
            "models": {"small": {"weights": "tiny"}},
            "select": [{"cut": {"score": "small", "keep": 0.5}}],
            "write": {"formats": ["parquet"]},
        }
    )
    executor = RayExecutor(TWO_WORKERS, "local")
    rates = []
    try:
        for number in range(1 + RUNS):
            root = str(scratch / f"ray-{number}")
            run = Run(Root(f"{root}/store"), Root(root), executor, TWO_WORKERS)
            curate(run, recipe)
            rates.append(TINY_PAIRS / next(float(stage["seconds"]) for stage in run.times if stage["stage"] == "embed"))
    finally:
        executor.close()
    return [(rate, 200.0) for rate in rates[1:]]


def vit(scratch: Path) -> Iterator[Row]:
    """ViT-B-32 in the precision that the processor is best at."""
    weights = scratch / "vit.safetensors"
    save_file(open_clip.create_model(ARCH).state_dict(), weights)
    model = {"arch": ARCH, "weights": str(weights)}
    images = pictures(PAIRS)
    pools = {words: Tars(scratch / f"vit-{words[0]}", images, captions(PAIRS, words)).write() for words in USUAL}
    more = Tars(scratch / "vit-limit", pictures(LIMIT_PAIRS), captions(LIMIT_PAIRS, SHORT)).write()
    yield limit_row(ARCH, more, scratch, model, 0.93)
    peer = usual_stack(weights)
    for words, pool in pools.items():
        some = Tars(scratch / f"some-{words[0]}", images[:TRY_PAIRS], pool.captions[:TRY_PAIRS]).write()
        peer(some, *PEER_TRIES[0])
        taken_s = {tried: seconds(partial(peer, some, *tried)) for tried in PEER_TRIES}
        workers, batch = min(taken_s, key=taken_s.__getitem__)
        yield compare(
            f"embed: {ARCH}, captions of {words[0]} to {words[1]} words",
            f"webdataset, DataLoader ({workers} workers, batch {batch}), open_clip",
            *(USUAL[words], "pairs/s", PAIRS),
            embedding(pool, scratch / f"own-{words[0]}", model),
            partial(peer, pool, workers, batch),
        )


def limit_row(name: str, pool: Tars, scratch: Path, model: dict[str, str], target: float) -> Row:
    """The stage against the sum of its parts, on the same threads, batches and precision."""
    own = embedding(pool, scratch / name, model)
    alone = passes(model, TWO_THREADS, pool.images, pool.captions)
    own()
    pairs = []
    for _ in range(RUNS):
        limit_s = alone()
        pairs.append((len(pool.images) / seconds(own), len(pool.images) / limit_s))
    return paired(f"embed: {name}", "decode, image and text forward alone", target, "pairs/s", pairs)


def passes(
    model: dict[str, str], machine: Machine, images: Sequence[bytes], captions: Sequence[str]
) -> Callable[[], float]:
    """A function that decodes images, and passes them and captions forward, each alone: the sum of their seconds."""
    encoder = Encoder(resolve(model.get("arch"), model["weights"]), numerics(machine), machine.threads)
    frame = framer([encoder.framing], fast=False)

    def frames() -> list[Uint8s]:
        return [framed[0] for image in images if isinstance(framed := frame(image), tuple)]

    frames_NHWC = np.stack(frames())
    batches = np.split(frames_NHWC, range(machine.image_batch, len(frames_NHWC), machine.image_batch))

    def forward() -> None:
        for frames_BHWC in batches:
            encoder.images(frames_BHWC)()

    def texts() -> None:
        encoder.texts(captions, machine.text_batch)

    return lambda: sum(map(seconds, (frames, forward, texts)))


def embedding(pool: Tars, folder: Path, model: dict[str, str]) -> Callable[[], None]:
    """A function that embeds the pool's tars, listed before, as a worker does, and writes the parts as it does."""
    machine = TWO_THREADS
    weights = resolve(model.get("arch"), model["weights"])
    function = embed("clip", weights, numerics(machine), "webdataset", False, ()).build(machine)
    units = list_units(Pool(format="webdataset", path=str(pool.folder)), {})
    samples = [TarSamples(webdataset.read(UnitFiles(unit, machine)).samples) for unit in units]
    store = Root(str(folder))

    def run() -> None:
        for unit, listed in zip(units, samples, strict=True):
            with UnitFiles(unit, machine) as files:
                made = function(files, listed)
            for name, table in made.tables.items():
                store.write(f"{unit.shard}-{name}.parquet", to_parquet(table, internal=True))

    return run


def usual_stack(weights: Path) -> Callable[[Tars, int, int], None]:
    """A function that embeds a pool as users of open_clip do, in the same precision: pool, workers, batch."""
    precision = numerics(TWO_THREADS).precision
    model, _, transform = open_clip.create_model_and_transforms(
        ARCH, pretrained=str(weights), precision=precision.replace("float", "fp")
    )
    model.eval()
    tokenizer = open_clip.get_tokenizer(ARCH)

    @torch.inference_mode()
    def run(pool: Tars, workers: int, batch: int) -> None:
        tars = sorted(map(str, pool.folder.glob("*.tar")))
        dataset = WebDataset(tars, shardshuffle=False).decode("pil").to_tuple("jpg", "txt")
        dataset = dataset.map_tuple(transform, lambda caption: tokenizer(caption)[0])
        found = [
            (
                model.encode_image(images.to(DTYPE[precision]), normalize=True).half().numpy(),
                model.encode_text(tokens, normalize=True).half().numpy(),
            )
            for images, tokens in DataLoader(dataset, batch_size=batch, num_workers=workers)
        ]
        for name, vec_NBD in zip(("image", "text"), zip(*found, strict=True), strict=True):
            np.save(pool.folder / f"{name}.npy", np.concatenate(vec_NBD))

    return run


def pictures(count: int) -> list[bytes]:
    """JPEGs, 64 different ones in turn."""
    different = [jpeg(photograph(number, 341, 256)) for number in range(64)]
    return [different[number % 64] for number in range(count)]


def captions(count: int, words_of_each: tuple[int, int]) -> list[str]:
    """Words of the names of emoji, which are common English words."""
    words = sorted({word for names in emoji.EMOJI_DATA.values() for word in names["en"].strip(":").split("_")})
    rng = random.Random(0)
    return [" ".join(rng.choices(words, k=rng.randint(*words_of_each))) for _ in range(count)]
