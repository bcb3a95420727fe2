"""Training of a filter network: WebDataset shards in, a CLIP model, its held-out figures and its card out.

The network is any open_clip model, so that what comes out is loaded like any other (`models:` of a recipe). Pairs are
held out by content: neither a near-copy of a training image nor a variant of its caption is among them. All randomness
is a function of the seed and the step, so a training that was stopped goes on to the weights of one that was not.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import fsspec
import numpy as np
import numpy.typing as npt
import open_clip
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field
from safetensors.torch import save_file

from pipeline.config import load_yaml, validate
from pipeline.encode import causal_mask, numerics
from pipeline.errors import UserError
from pipeline.formats import webdataset
from pipeline.formats.reading import Reading
from pipeline.held_out import (
    DRAWS,
    Figures,
    caption_stem,
    content_groups,
    held_out_figures,
    hold_out,
    perceptual_hash,
)
from pipeline.images import Undecodable, decode
from pipeline.machine import Machine
from pipeline.pool import Pool, list_units
from pipeline.stage import Unit
from pipeline.storage import UnitFiles, redacted

AHEAD = 2
"""Batches decoded while one is learned from."""
MAX_SCALE = 100.0
"""CLIP's bound on the inverse temperature."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Data(_Part):
    """The pairs to learn from."""

    path: str
    """Shards as a local path or fsspec URL, with a glob."""
    skip_sources: tuple[str, ...] = ()
    """Values of `source` in the .json whose pairs are left out, for example for their licence."""
    captions: tuple[str, ...] = ()
    """Further fields of the .json that may stand for the caption in training: a text, or a JSON list of words."""
    held_out: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Fraction of the pairs that is never trained on."""


class Model(_Part):
    """The network to train, in open_clip's words."""

    arch: str
    config: str | None = None
    """A model config (JSON) to add to open_clip's own; its stem is the arch."""
    weights: str | None = None
    """Where training starts: open_clip tag or local file; null: random."""
    unlocked_groups: Annotated[int, Field(ge=0)] | None = None
    """Layer groups of the image tower that learn, counted from its end (open_clip's lock_image_tower); null: all."""
    bpe: str | None = None
    """Merges of a smaller vocabulary, for open_clip's SimpleTokenizer."""


class Teacher(_Part):
    """Vectors to imitate: precomputed ones (`images`, `texts`) or those of an open_clip model (`arch`, `weights`)."""

    images: str | None = None
    """Parquet with `key` and `vector`: a pair's image as the teacher sees it."""
    texts: str | None = None
    """Parquet with `text` and `vector`: captions and their variants as the teacher sees them."""
    arch: str | None = None
    weights: str | None = None
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Of the distillation loss, beside the contrastive loss at 1."""


class TrainRecipe(_Part):
    """Everything that decides which weights come out, but for the processor's last bits."""

    data: Data
    model: Model
    teacher: Teacher | None = None
    batch: Annotated[int, Field(ge=2)] = 256
    epochs: Annotated[int, Field(ge=1)] = 10
    learning_rate: Annotated[float, Field(gt=0)] = 5e-4
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Fraction of the steps in which the learning rate rises."""
    min_crop: Annotated[float, Field(gt=0, le=1)] = 0.8
    """Smallest side of the random crop as a fraction of the image's; 1: no crop."""
    save_as: Literal["float32", "float16"] = "float32"
    seed: Annotated[int, Field(ge=0)] = 0


def load_train_recipe(path: Path) -> TrainRecipe:
    """Read a training recipe.

    Raises:
        UserError: the file is missing or not YAML, a key is unknown or a value wrong; the message names it.
    """
    return validate(TrainRecipe, load_yaml(path), "recipe")


# ---------------------------------------------------------------------------------------------------------- the pairs


@dataclass(frozen=True)
class Pair:
    """One image-text pair and where its image's bytes lie."""

    key: str
    caption: str
    variants: tuple[str, ...]
    source: str
    license: str
    unit: int
    """The shard's place in the list of shards."""
    start: int
    stop: int


@dataclass(frozen=True)
class Pairs:
    """Every usable pair of a pool, in its order, and a way to their image bytes."""

    units: list[Unit]
    rows: list[Pair]
    machine: Machine

    def image(self, pair: Pair) -> Image.Image | Undecodable:
        """Decode a pair's image."""
        with UnitFiles(self.units[pair.unit], self.machine) as files:
            (data,) = files.read("tar", [(pair.start, pair.stop)])
        image = decode(data)
        return image if isinstance(image, Undecodable) else image.convert("RGB")


def list_pairs(data: Data, machine: Machine) -> Pairs:
    """Read captions and image positions of all shards; samples with a problem are left out.

    Raises:
        UserError: no shard, or no pair, is there.
    """
    units = list_units(Pool("webdataset", data.path), machine.storage_options)
    rows: list[Pair] = []
    for number, unit in enumerate(units):
        with UnitFiles(unit, machine) as files:
            rows += _shard_pairs(webdataset.read(files), number, data)
    if not rows:
        raise UserError(f"recipe.data.path: no image-text pair in {redacted(data.path)}")
    return Pairs(units, rows, machine)


def _shard_pairs(reading: Reading, unit: int, data: Data) -> Iterator[Pair]:
    for sample, fields in zip(reading.samples.to_pylist(), reading.columns.to_pylist(), strict=True):
        if sample["problem"] is not None or fields.get("source") in data.skip_sources:
            continue
        image = sample["image"]
        yield Pair(
            key=sample["key"],
            caption=sample["caption"],
            variants=tuple(text for name in data.captions if (text := _as_text(fields.get(name)))),
            source=str(fields.get("source") or "unnamed"),
            license=str(fields.get("license") or "unknown"),
            unit=unit,
            start=image["offset"],
            stop=image["offset"] + image["bytes"],
        )


def _as_text(value: object) -> str:
    """A field as one text: lists of words, also those written as JSON, are joined by commas."""
    if isinstance(value, str) and value.startswith("["):
        with suppress(ValueError):  # else a text that happens to begin with a bracket
            value = json.loads(value)
    if isinstance(value, list):
        return ", ".join(str(word) for word in value)
    return value.strip() if isinstance(value, str) else ""


# -------------------------------------------------------------------------------------------------------------- losses


def contrastive_loss(
    image_BD: torch.Tensor, text_BD: torch.Tensor, scale: torch.Tensor | float, same_BB: torch.Tensor
) -> torch.Tensor:
    """CLIP's symmetric cross-entropy: each image should pick its text out of the batch, and each text its image.

    Args:
        image_BD, text_BD: float, unit rows, row i of both from pair i.
        scale: factor on the cosines, above 0 (the inverse temperature).
        same_BB: bool; off the diagonal, pairs with one caption, which are no mismatch of each other.

    Returns:
        Mean of both directions, a scalar.

    Source: Radford et al. 2021 (CLIP), figure 3; equal captions left out as in SupCon's negatives.
    """
    eye_BB = torch.eye(len(image_BD), dtype=torch.bool, device=image_BD.device)
    cos_BB = (scale * image_BD @ text_BD.T).masked_fill(same_BB & ~eye_BB, -torch.inf)
    target_B = torch.arange(len(image_BD), device=image_BD.device)
    return (F.cross_entropy(cos_BB, target_B) + F.cross_entropy(cos_BB.T, target_B)) / 2


def distillation_loss(student_BD: torch.Tensor, teacher_BD: torch.Tensor) -> torch.Tensor:
    """Mean of 1 - cosine between the student's and the teacher's unit rows: in [0, 2], 0 where they agree."""
    return (1 - (student_BD * teacher_BD).sum(dim=1)).mean()


def learning_rate(step: int, steps: int, warmup: float, peak: float) -> float:
    """Linear rise over the first `warmup` of the steps, then half a cosine down to 0."""
    rise = round(warmup * steps)
    if step < rise:
        return peak * (step + 1) / rise
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


# ----------------------------------------------------------------------------------------------------------- the model

Transform = Callable[[Image.Image], torch.Tensor]
Tokenizer = Callable[[list[str]], torch.Tensor]


def build_model(model: Model) -> tuple[Any, Transform, Tokenizer]:
    """The network with open_clip's own inference transform and tokenizer.

    Raises:
        UserError: open_clip does not know the arch, or cannot load the weights.
    """
    if model.config is not None:
        if not Path(model.config).is_file():
            raise UserError(f"recipe.model.config: no such file: {model.config}")
        open_clip.add_model_config(model.config)
    try:
        network, _, transform = open_clip.create_model_and_transforms(model.arch, pretrained=model.weights)
        tokenizer = open_clip.get_tokenizer(model.arch, **({"bpe_path": model.bpe} if model.bpe else {}))
    except (RuntimeError, OSError) as error:
        raise UserError(f"recipe.model: {model.arch}, {model.weights}: {' '.join(str(error).split())[:300]}") from None
    return network, transform, tokenizer


@dataclass(frozen=True)
class _Towers:
    """A network as two functions to unit vectors, float32 (B, D)."""

    network: Any
    tokenizer: Tokenizer
    device: torch.device
    causal_mask: torch.Tensor | None

    def images(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        pixels = pixels_BCHW.to(self.device, memory_format=torch.channels_last)
        return F.normalize(self.network.encode_image(pixels).float(), dim=-1)

    def texts(self, texts: list[str]) -> torch.Tensor:
        """A causal tower is spared the padding behind the longest text: its vectors depend on nothing there."""
        tokens_BL = self.tokenizer(texts)
        if self.causal_mask is not None:
            length = int(tokens_BL.any(dim=0).nonzero().max()) + 1
            tokens_BL = tokens_BL[:, :length]
            self.network.text.attn_mask = self.causal_mask[:length, :length]
        return F.normalize(self.network.encode_text(tokens_BL.to(self.device)).float(), dim=-1)


def _towers(model: Model, device: torch.device) -> tuple[_Towers, Transform]:
    network, transform, tokenizer = build_model(model)
    network.to(device, memory_format=torch.channels_last)
    mask = causal_mask(network.text) if hasattr(network, "text") else None
    return _Towers(network, tokenizer, device, mask), transform


def _to_train_mode(network: Any) -> None:
    """Frozen normalisations keep their running statistics, so that a locked layer gives what it gave before."""
    network.train()
    for module in network.visual.modules():
        if isinstance(module, torch.nn.BatchNorm2d) and not module.weight.requires_grad:
            module.eval()


@dataclass(frozen=True)
class _Teaching:
    """What the student imitates: unit vectors of images and texts, float32."""

    image: Callable[[list[str], list[Image.Image]], torch.Tensor]
    text: Callable[[list[str]], torch.Tensor]
    weight: float


def _teaching(teacher: Teacher, dims: int, device: torch.device) -> _Teaching:
    taught = _teacher_of(teacher, device)
    if (width := taught.text([""] if teacher.arch else []).shape[1]) != dims:
        raise UserError(f"recipe.teacher: its vectors have {width} numbers, the model's {dims}")
    return taught


def _teacher_of(teacher: Teacher, device: torch.device) -> _Teaching:
    if teacher.images is not None and teacher.texts is not None:
        images, texts = _vectors(teacher.images, "key", device), _vectors(teacher.texts, "text", device)
        return _Teaching(image=lambda keys, _crops: images(keys), text=texts, weight=teacher.weight)
    if teacher.arch is None:
        raise UserError("recipe.teacher: needs images and texts, or arch")
    towers, transform = _towers(Model(arch=teacher.arch, weights=teacher.weights), device)
    towers.network.eval()

    @torch.no_grad()
    def image(_keys: list[str], crops: list[Image.Image]) -> torch.Tensor:
        return towers.images(torch.stack([transform(crop) for crop in crops]))

    return _Teaching(image=image, text=torch.no_grad()(towers.texts), weight=teacher.weight)


@dataclass(frozen=True)
class _Vectors:
    """Rows of a parquet file by name."""

    url: str
    row_of: dict[str, int]
    vector_ND: torch.Tensor

    def __call__(self, names: list[str]) -> torch.Tensor:
        try:
            return self.vector_ND[[self.row_of[name] for name in names]]
        except KeyError as error:
            raise UserError(f"recipe.teacher: {self.url} has no vector of {error.args[0]!r}") from None


def _vectors(url: str, name: str, device: torch.device) -> _Vectors:
    try:
        with fsspec.open(url, "rb") as file:
            table = pq.read_table(file, columns=[name, "vector"])
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"recipe.teacher: {url}: cannot be read: {error}") from None
    vector_ND = torch.tensor(np.array(table["vector"].to_pylist(), np.float32))
    row_of = {text: row for row, text in enumerate(table[name].to_pylist())}
    return _Vectors(url, row_of, F.normalize(vector_ND, dim=-1).to(device))


# -------------------------------------------------------------------------------------------------------- the training


@dataclass(frozen=True)
class _Split:
    """The readable pairs, their content groups, and which of them are held out."""

    rows: list[Pair]
    groups: list[int]
    held: npt.NDArray[np.bool_]
    unreadable: int


def _split(pairs: Pairs, recipe: TrainRecipe, machine: Machine) -> _Split:
    def image_hash(pair: Pair) -> int | None:
        image = pairs.image(pair)
        return None if isinstance(image, Undecodable) else perceptual_hash(image)

    with ThreadPoolExecutor(max(1, machine.decoders)) as pool:
        hashes = list(pool.map(image_hash, pairs.rows))
    readable = [(pair, value) for pair, value in zip(pairs.rows, hashes, strict=True) if value is not None]
    rows = [pair for pair, _ in readable]
    groups = content_groups([caption_stem(pair.caption) for pair in rows], [value for _, value in readable])
    held = hold_out(groups, [pair.key for pair in rows], recipe.data.held_out, recipe.seed)
    return _Split(rows, groups, held, len(pairs.rows) - len(rows))


@dataclass(frozen=True)
class _Batch:
    crops: list[Image.Image]
    pixels_BCHW: torch.Tensor
    texts: list[str]
    keys: list[str]
    same_BB: torch.Tensor


@dataclass(frozen=True)
class _Batches:
    """The batch of any step: a function of the seed and the step alone, so that resuming shows the same."""

    recipe: TrainRecipe
    pairs: Pairs
    rows: list[Pair]
    transform: Transform

    @property
    def per_epoch(self) -> int:
        return len(self.rows) // self.recipe.batch

    def __call__(self, step: int) -> _Batch:
        epoch, place = divmod(step, self.per_epoch)
        order = np.random.default_rng([self.recipe.seed, epoch]).permutation(len(self.rows))
        chosen = [self.rows[i] for i in order[place * self.recipe.batch :][: self.recipe.batch]]
        crops, texts = zip(*(self._shown(pair, step, row) for row, pair in enumerate(chosen)), strict=True)
        captions = np.array([pair.caption.lower() for pair in chosen])
        return _Batch(
            crops=list(crops),
            pixels_BCHW=torch.stack([self.transform(crop) for crop in crops]),
            texts=list(texts),
            keys=[pair.key for pair in chosen],
            same_BB=torch.from_numpy(captions[:, None] == captions[None, :]),
        )

    def _shown(self, pair: Pair, step: int, row: int) -> tuple[Image.Image, str]:
        """A random crop of the image, and its caption or, every other time, one of the variants."""
        image = self.pairs.image(pair)
        if isinstance(image, Undecodable):
            raise OSError(f"{pair.key}: {image.detail}; the shard changed since it was listed")
        rng = np.random.default_rng([self.recipe.seed, step, row])
        share, left, top = rng.uniform(self.recipe.min_crop, 1), rng.uniform(), rng.uniform()
        width, height = max(1, round(image.width * share)), max(1, round(image.height * share))
        x, y = round(left * (image.width - width)), round(top * (image.height - height))
        text = pair.caption
        if pair.variants and rng.uniform() < 0.5:
            text = pair.variants[int(rng.integers(len(pair.variants)))]
        return image.crop((x, y, x + width, y + height)), text


@dataclass(frozen=True)
class Trained:
    """What a training leaves behind."""

    weights: Path
    card: Path
    figures: Figures | None


Progress = Callable[[int, int, float], None]
"""Called after each step with: steps done, steps in all, loss."""


def train(
    recipe: TrainRecipe, out: Path, machine: Machine, progress: Progress = lambda done, steps, loss: None
) -> Trained:
    """Train a network, or go on where an earlier call with the same recipe and folder stopped.

    Writes model.safetensors and README.md (the card) into `out`; checkpoint.pt after each epoch.

    Args:
        recipe: what to train on what.
        out: a local folder; made if missing.
        machine: device, precision, threads, decoders and storage options; on a processor float32 unless it says bf16.
        progress: told of every step.

    Raises:
        UserError: no pair to train on, an unknown model, a teacher that lacks a vector or has another width, or a
            checkpoint of another recipe.
    """
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(machine.threads)
    torch.manual_seed(recipe.seed)
    device, autocast = _device(machine)
    towers, transform = _towers(recipe.model, device)
    network = towers.network
    if recipe.model.unlocked_groups is not None:
        network.lock_image_tower(unlocked_groups=recipe.model.unlocked_groups)
    dims = towers.texts([""]).shape[1]
    teaching = _teaching(recipe.teacher, dims, device) if recipe.teacher else None

    pairs = list_pairs(recipe.data, machine)
    split = _split(pairs, recipe, machine)
    batches = _Batches(recipe, pairs, [split.rows[i] for i in np.flatnonzero(~split.held)], transform)
    if batches.per_epoch == 0:
        raise UserError(f"recipe.batch: {recipe.batch} is more than the {len(batches.rows)} pairs to train on")
    steps = batches.per_epoch * recipe.epochs

    optimizer = _optimizer(network, recipe)
    checkpoint = out / "checkpoint.pt"
    start = _resume(checkpoint, recipe, network, optimizer)
    _to_train_mode(network)
    with ThreadPoolExecutor(max(1, machine.decoders)) as pool:
        ahead = deque(pool.submit(batches, step) for step in range(start, min(steps, start + AHEAD)))
        for step in range(start, steps):
            batch = ahead.popleft().result()
            if step + AHEAD < steps:
                ahead.append(pool.submit(batches, step + AHEAD))
            torch.manual_seed(recipe.seed + step)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, recipe.warmup, recipe.learning_rate)
            with autocast():
                image_BD, text_BD = towers.images(batch.pixels_BCHW), towers.texts(batch.texts)
            scale = network.logit_scale.exp().clamp(max=MAX_SCALE)
            loss = contrastive_loss(image_BD, text_BD, scale, batch.same_BB.to(device))
            if teaching is not None:
                loss = loss + teaching.weight * (
                    distillation_loss(image_BD, teaching.image(batch.keys, batch.crops))
                    + distillation_loss(text_BD, teaching.text(batch.texts))
                )
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            progress(step + 1, steps, float(loss.detach()))
            if (step + 1) % batches.per_epoch == 0:
                _save_checkpoint(checkpoint, recipe, network, optimizer, step + 1)

    figures = _figures(towers, transform, pairs, split) if split.held.any() else None
    trained = Trained(out / "model.safetensors", out / "README.md", figures)
    _save_weights(trained.weights, network, recipe)
    trained.card.write_text(model_card(recipe, batches.rows, figures, split.unreadable), "utf-8")
    return trained


def _save_weights(path: Path, network: Any, recipe: TrainRecipe) -> None:
    """Only matrices are stored in float16: the variances of a batch normalisation may lie outside of its range."""
    half = recipe.save_as == "float16"
    state = {name: tensor.cpu().contiguous() for name, tensor in network.state_dict().items()}
    save_file({name: tensor.half() if half and tensor.ndim >= 2 else tensor for name, tensor in state.items()}, path)


def _device(machine: Machine) -> tuple[torch.device, Callable[[], AbstractContextManager[Any]]]:
    found = numerics(machine)
    if found.precision == "fp16":
        raise UserError("machine.precision: fp16 gradients vanish without scaling; train in bf16 or float32")
    device = torch.device(found.device)
    if found.precision == "bf16" and (machine.precision == "bf16" or device.type == "cuda"):
        return device, lambda: torch.autocast(device.type, torch.bfloat16)
    return device, nullcontext


def _optimizer(network: Any, recipe: TrainRecipe) -> torch.optim.Optimizer:
    """AdamW as CLIP is trained: gains and biases do not decay."""
    learned = [p for p in network.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in learned if p.ndim >= 2], "weight_decay": recipe.weight_decay},
        {"params": [p for p in learned if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), eps=1e-6)


def _identity(recipe: TrainRecipe) -> str:
    """Stands for the recipe in a checkpoint, which others may load: a digest, since its path may hold a secret."""
    return hashlib.sha256(json.dumps(recipe.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()


def _save_checkpoint(
    path: Path, recipe: TrainRecipe, network: Any, optimizer: torch.optim.Optimizer, step: int
) -> None:
    state = {
        "recipe": _identity(recipe),
        "step": step,
        "network": network.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    half = path.with_suffix(".tmp")
    torch.save(state, half)
    half.replace(path)


def _resume(path: Path, recipe: TrainRecipe, network: Any, optimizer: torch.optim.Optimizer) -> int:
    """Load a checkpoint where there is one; the number of steps already done."""
    if not path.exists():
        return 0
    state = torch.load(path, map_location="cpu", weights_only=True)
    if state["recipe"] != _identity(recipe):
        raise UserError(f"{path}: from another recipe; remove it or choose another folder")
    network.load_state_dict(state["network"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])


@torch.no_grad()
def _figures(towers: _Towers, transform: Transform, pairs: Pairs, split: _Split) -> Figures:
    towers.network.eval()
    held = [int(i) for i in np.flatnonzero(split.held)]
    image, text = [], []
    for start in range(0, len(held), 64):
        block = [split.rows[i] for i in held[start : start + 64]]
        pictures = [pairs.image(pair) for pair in block]
        pixels_BCHW = torch.stack([transform(picture) for picture in pictures if isinstance(picture, Image.Image)])
        image.append(towers.images(pixels_BCHW).cpu().numpy())
        text.append(towers.texts([pair.caption for pair in block]).cpu().numpy())
    sources, groups = [split.rows[i].source for i in held], [split.groups[i] for i in held]
    return held_out_figures(np.concatenate(image), np.concatenate(text), sources, groups)


# ------------------------------------------------------------------------------------------------------------ the card


def model_card(recipe: TrainRecipe, pairs: Sequence[Pair], figures: Figures | None, unreadable: int) -> str:
    """The README of a trained network: what it is, what it saw under which licences, and how well it does.

    Args:
        recipe: what was asked.
        pairs: those it was trained on.
        figures: on held-out pairs, or None where none were held out.
        unreadable: pairs left out because their image does not decode.
    """
    counts = Counter((pair.source, pair.license) for pair in pairs)
    skipped = ", ".join(recipe.data.skip_sources) or "none"
    taught = "with" if recipe.teacher else "without"
    lines = [
        f"# {recipe.model.arch}",
        "",
        f"A CLIP model, trained by `pairsieve train-filter` {taught} a teacher on {len(pairs):,} image-text pairs.",
        f"Epochs: {recipe.epochs}; batch: {recipe.batch}. A pair's score is the cosine of its two vectors.",
        "",
        "## Data and licences",
        "",
        "| source | licence | pairs |",
        "|---|---|---|",
        *(f"| {source} | {licence} | {count:,} |" for (source, licence), count in sorted(counts.items())),
        "",
        f"Sources left out: {skipped}. Pairs left out for an unreadable image: {unreadable}.",
        "",
    ]
    return "\n".join(lines + (_figure_lines(figures) if figures else []))


def _figure_lines(figures: Figures) -> list[str]:
    pool = figures.recall_pool
    return [
        "## On held-out pairs",
        "",
        f"{figures.pairs:,} pairs in {figures.groups:,} groups, split by content: no near-copy of a held-out image",
        "(perceptual hashes within 6 of 64 bits, directly or in a chain) and no variant of its caption was trained on.",
        f"Mismatched pairs are the image with a caption of another group, {DRAWS} drawn for each.",
        "",
        "| measure | value | chance |",
        "|---|---|---|",
        f"| AUC, mismatched drawn inside the source | {figures.auc_inside:.3f} | 0.500 |",
        f"| AUC, mismatched drawn across all sources | {figures.auc_across:.3f} | 0.500 |",
        f"| recall@1, image to text among {pool} | {figures.recall_1:.3f} | {1 / pool:.3f} |",
        f"| recall@5, image to text among {pool} | {figures.recall_5:.3f} | {5 / pool:.3f} |",
        "",
        "| source | AUC inside |",
        "|---|---|",
        *(f"| {source} | {value:.3f} |" for source, value in figures.auc_by_source.items()),
        "",
    ]
