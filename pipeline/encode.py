"""CLIP models through open_clip: which weights are meant, what a machine really computes with, and the two towers.

In: an architecture and weights as a recipe names them; decoded images and captions. Out: float32 vectors, not yet of
unit length. The only module beside train.py that imports torch or open_clip.
"""

from __future__ import annotations

import copy
import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, TypeVar

import numpy as np
import open_clip
import torch
from numpy.typing import NDArray
from open_clip.pretrained import download_pretrained_from_hf
from open_clip.transform import PreprocessCfg, image_transform_v2
from open_clip.transformer import TextTransformer
from PIL import Image
from safetensors import SafetensorError
from torch.nn.functional import interpolate
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.transforms import Resize

from pipeline import tiny
from pipeline.config import nearest
from pipeline.errors import UserError
from pipeline.images import MAX_PIXELS, Decoded, size_px
from pipeline.machine import Machine, bf16_flags, keep_freed_memory
from pipeline.vectors import Float32s, Uint8s

log = logging.getLogger(__name__)

HUB = "hf-hub:"
SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
CHARS_PER_TOKEN = 64
"""Characters of a caption that are tokenized, per token of context. No token of open_clip's vocabulary is longer than
32, so the cut shows only in captions that are mostly spaces; a word of a megabyte would take the tokenizer hours."""
LENGTH_STEP = 4
"""Tokens."""
CACHED_WORDS = 1_000_000
"""Words whose tokens open_clip's tokenizer may remember before it starts anew: it never forgets one by itself."""
DTYPE = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

T = TypeVar("T")


@dataclass(frozen=True)
class Weights:
    """One model's weights, found and on the local disk.

    Attributes:
        arch: open_clip's name of the architecture, or `hf-hub:org/name` where the hub says it.
        source: what gave them: `tiny`, a pretrained tag, `hf-hub:org/name`, or `file`.
        path: the local file.
        sha256: hex digest of that file.
        quick_gelu: whether the activation is forced to QuickGELU, because the tag was trained so and the architecture's
            config does not say so. Scores shift silently otherwise (methods.md 4.3).
    """

    arch: str
    source: str
    path: str
    sha256: str
    quick_gelu: bool = False


@dataclass(frozen=True)
class Numerics:
    """What the forward pass is computed with; all of it but `device` belongs to the key of embeddings.

    Attributes:
        device: `cpu` or `cuda`.
        precision: `float32`, `bf16` or `fp16`.
        kind: processor features or GPU model, and torch's version.
    """

    device: str
    precision: str
    kind: str


def resolve(arch: str | None, weights: str) -> Weights:
    """Find the weights that a recipe names, downloading them where need be.

    Args:
        arch: open_clip's name of an architecture; None for `tiny` and `hf-hub:`, which bring theirs.
        weights: `tiny`, `hf-hub:org/name`, a local .safetensors, .pt, .pth or .bin file, or a pretrained tag of `arch`.

    Raises:
        UserError: no such architecture, tag or file, or they cannot be downloaded; the message names the nearest known.
    """
    if weights == "tiny":
        if arch is not None:
            raise UserError("arch: weights 'tiny' bring their own, leave it out")
        open_clip.add_model_config(tiny.CONFIG)
        return _weights(tiny.ARCH, "tiny", str(tiny.WEIGHTS))
    name = None if arch is None else arch.replace("/", "-")
    if name is not None and name not in open_clip.list_models():
        raise UserError(f"arch: open_clip has no architecture {arch!r}{nearest(name, open_clip.list_models())}")
    if weights.startswith(HUB):
        path = _downloaded(weights, lambda: str(download_pretrained_from_hf(weights.removeprefix(HUB))))
        config = _downloaded(weights, lambda: open_clip.get_model_config(weights))
        if name is not None and not _same_shape(config, open_clip.get_model_config(name)):
            raise UserError(f"arch: {weights} is no {name}; leave arch out, the hub says what it is")
        return _weights(weights, weights, path)
    if name is None:
        raise UserError(f"arch: required for weights {weights!r}")
    if weights.endswith(SUFFIXES):
        if not Path(weights).is_file():
            raise UserError(f"weights: there is no file {weights!r}")
        return _weights(name, "file", weights)
    tags = open_clip.list_pretrained_tags_by_model(name)
    if weights not in tags:
        known = nearest(weights, tags) or "; it has no tags"
        raise UserError(f"weights: {weights!r} is no {', '.join(SUFFIXES)} file, and no tag of {name}{known}")
    tagged = open_clip.get_pretrained_cfg(name, weights)
    path = _downloaded(weights, lambda: str(open_clip.download_pretrained(tagged)))
    quick_gelu = bool(tagged.get("quick_gelu")) and not open_clip.get_model_config(name).get("quick_gelu")
    return _weights(name, weights, path, quick_gelu)


def _same_shape(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two model configs agree in the length of their vectors and in all that both say of the image tower."""
    vision = other["vision_cfg"]
    return bool(one["embed_dim"] == other["embed_dim"]) and all(
        vision.get(key, value) == value for key, value in one["vision_cfg"].items()
    )


def _downloaded(weights: str, download: Callable[[], T]) -> T:
    try:
        return download()
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).split("Last error: ")[-1]
        raise UserError(
            f"weights: {weights!r} could not be downloaded, and are not in the local cache ({reason[:300]}). "
            "Without a network, give a local .safetensors or .pt file"
        ) from None


def _weights(arch: str, source: str, path: str, quick_gelu: bool = False) -> Weights:
    if not path.endswith(SUFFIXES):
        raise UserError(f"weights: {path!r}: only {', '.join(SUFFIXES)} files are loaded")
    try:
        with open(path, "rb") as file:
            sha256 = hashlib.sha256()
            while block := file.read(1 << 20):
                sha256.update(block)
    except OSError as error:
        raise UserError(f"weights: {path!r}: cannot be read: {error.strerror}") from None
    return Weights(arch, source, path, sha256.hexdigest(), quick_gelu)


def numerics(machine: Machine) -> Numerics:
    """What this worker will really compute with.

    Raises:
        UserError: the machine file demands a device or a precision that is not there.
    """
    if machine.device == "cuda" and not torch.cuda.is_available():
        raise UserError("machine.device: cuda is demanded, but torch finds no GPU on this host")
    if machine.device != "cpu" and torch.cuda.is_available():
        best = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        kind = f"{torch.cuda.get_device_name()} torch {torch.__version__}"
        return Numerics("cuda", best if machine.precision == "auto" else machine.precision, kind)
    if machine.precision == "fp16":
        raise UserError("machine.precision: fp16 needs a GPU; a processor has bf16 or float32")
    fast = bf16_flags()
    version = torch.__version__.split("+")[0]  # of the CUDA build a processor takes no notice
    kind = " ".join(["cpu", torch.backends.cpu.get_cpu_capability().lower(), *fast, "torch", version])
    best = "bf16" if fast else "float32"
    return Numerics("cpu", best if machine.precision == "auto" else machine.precision, kind)


@dataclass(frozen=True)
class Framing:
    """The part of a model's transform that makes pixels of the right size; equal framings share their frames.

    Attributes:
        size: height and width of the frame, px.
        interpolation: open_clip's word: bicubic, bilinear or random (which means bicubic).
        resize_mode: open_clip's word: shortest, longest or squash.
        fill_color: of the padding, for `longest`.
    """

    size: tuple[int, int]
    interpolation: str
    resize_mode: str
    fill_color: int

    def build(self, fast: bool = False) -> Callable[[Decoded], Uint8s]:
        """open_clip's own transform but for its last two steps (to tensor, normalise).

        An RGB image is resized by torch, six times as fast as by Pillow; levels differ by at most 1, in few pixels.

        Args:
            fast: of a larger RGB image, cut the middle square before it is resized, not after: each edge is then half a
                pixel at most aside.

        Returns:
            A function from an image of any mode, or from the levels of an RGB one (uint8, shape (H, W, 3)), to uint8,
            shape (height, width, 3); safe in threads. It raises ValueError for an image so thin that nothing of it is
            left.
        """
        transform = image_transform_v2(
            PreprocessCfg(
                size=self.size,
                interpolation=self.interpolation,
                resize_mode=self.resize_mode,
                fill_color=self.fill_color,
            ),
            is_train=False,
        )
        resize, *steps = transform.transforms[:-2]

        def frame(image: Decoded) -> Uint8s:
            if self.resize_mode == "shortest":
                image = _shortened(image, max(self.size))
            if isinstance(resize, Resize):
                if isinstance(image, Image.Image) and image.mode == "RGB":
                    image = np.array(image)
                if isinstance(image, np.ndarray):
                    size = _resized_px(image.shape[0], image.shape[1], resize.size)
                    if fast and isinstance(resize.size, int) and resize.size <= min(image.shape[:2]):
                        return _resized(_cut(image, size, resize.size), self.size, resize)
                    return _resized(image, size, resize, steps[:-1])
            elif isinstance(image, np.ndarray):
                image = Image.fromarray(image)
            if isinstance(image.info.get("transparency"), bytes):
                del image.info["transparency"]  # Pillow would only remark that RGB cannot hold it
            for step in (resize, *steps):
                image = step(image)
            return np.asarray(image)

        return frame


def _resized(
    levels_HWC: Uint8s,
    size: Sequence[int],
    resize: Resize,
    crops: Sequence[Callable[[torch.Tensor], torch.Tensor]] = (),
) -> Uint8s:
    """An RGB image's levels in another size (height, width), as `resize` makes it, then cut; in memory of its own."""
    pixels = torch.from_numpy(levels_HWC)[None].permute(0, 3, 1, 2)
    # torchvision's own function comes to this call, by way of checks that take a sixth of the time of a small image.
    pixels = interpolate(pixels, size, mode=resize.interpolation.value, align_corners=False, antialias=True)[0]
    for crop in crops:
        pixels = crop(pixels)
    return pixels.permute(1, 2, 0).contiguous().numpy()


def _cut(levels_HWC: Uint8s, size: Sequence[int], side: int) -> Uint8s:
    """What becomes the middle `side` x `side` px of an image that is resized to `size`, px (height, width).

    Edges are rounded to pixels of the image, so it need not be square.
    """
    edges = []
    for whole, resized in zip(levels_HWC.shape[:2], size, strict=True):
        first = round((resized - side) / 2)  # as torchvision's CenterCrop
        edges.append(slice(round(first * whole / resized), round((first + side) * whole / resized)))
    return levels_HWC[edges[0], edges[1]]


def _resized_px(height: int, width: int, size: int | Sequence[int]) -> list[int]:
    """Height and width after torchvision's Resize: both as given, or the shorter side, and the other in proportion."""
    if not isinstance(size, int):
        return list(size)
    short = min(height, width)
    return [int(size * height / short), int(size * width / short)]


def _shortened(image: Decoded, side: int) -> Decoded:
    """The middle of an image whose shorter side cannot be scaled to `side` px within MAX_PIXELS; any other as it is."""
    width, height = size_px(image)
    short = min(width, height)
    if max(width, height) * side * side <= MAX_PIXELS * short:
        return image
    left, top = max(0, (width - 4 * short) // 2), max(0, (height - 4 * short) // 2)
    right, bottom = min(width, left + 4 * short), min(height, top + 4 * short)
    return image.crop((left, top, right, bottom)) if isinstance(image, Image.Image) else image[top:bottom, left:right]


def described(arch: str) -> tuple[Framing, int]:
    """How an architecture's images are cut, by default, and D of its vectors, without any weights.

    Raises:
        UserError: open_clip does not know it.
    """
    config = open_clip.get_model_config(arch.replace("/", "-"))
    if config is None:
        raise UserError(f"arch: open_clip has no architecture {arch!r}{nearest(arch, open_clip.list_models())}")
    size = config["vision_cfg"]["image_size"]
    height, width = (size, size) if isinstance(size, int) else size
    return Framing((height, width), "bicubic", "shortest", 0), int(config["embed_dim"])


class Encoder:
    """Both towers of one model on this worker's device, loaded once and used for any number of units.

    Attributes:
        dims: D, the length of its vectors.
        framing: how its images are cut.
        halved: batches that did not fit into memory and were halved, since the encoder was made.
    """

    def __init__(self, weights: Weights, numerics: Numerics, threads: int) -> None:
        """Load the weights.

        Args:
            weights: what `resolve` found.
            numerics: device and precision. An image tower with batch normalisation always computes in float32.
            threads: of the numeric kernels, for the whole process.

        Raises:
            UserError: the file is damaged, holds more than weights, or does not fit the architecture.
        """
        torch.set_num_threads(threads)
        keep_freed_memory()
        torch.backends.cudnn.allow_tf32 = False
        self.device = torch.device(numerics.device)
        self.model = _load(weights)
        config = PreprocessCfg(**self.model.visual.preprocess_cfg)
        size = config.size if isinstance(config.size, int) else tuple(config.size)
        self.framing = Framing(
            (size, size) if isinstance(size, int) else size, config.interpolation, config.resize_mode, config.fill_color
        )
        # bf16 moved scores of an EfficientNet by up to 0.06; vectors of ViT-B-32 keep a cosine above 0.9999. Casting
        # weights is as close to float32 as autocast, and on a processor 4 times as fast.
        batch_norm = any(isinstance(module, torch.nn.BatchNorm2d) for module in self.model.visual.modules())
        (self.model.text if batch_norm else self.model).to(DTYPE[numerics.precision])
        if batch_norm:
            self.model.visual = folded(self.model.visual, _noise(self.framing))
        self.model.to(self.device)
        self.image_dtype = next(self.model.visual.parameters()).dtype
        self.tokenizer = _tokenizer(weights)
        self.halved = 0
        self.mean = torch.tensor(config.mean, device=self.device)
        self.std = torch.tensor(config.std, device=self.device)
        self.causal_mask = causal_mask(self.model.text)
        self.dims = int(self._text_forward(self._tokens([""])).shape[1])

    @torch.inference_mode()
    def images(self, frames_BHWC: Uint8s) -> Callable[[], Float32s]:
        """Start the image tower on one batch.

        Args:
            frames_BHWC: uint8, shape (B, height, width, 3), made by `framing`.

        Returns:
            A function that waits for the result: float32, shape (B, D).
        """
        frames = torch.from_numpy(frames_BHWC)
        if self.device.type == "cuda":
            frames = frames.pin_memory()
        vec_BD = self._in_halves(self._image_forward, frames)
        return lambda: vec_BD.cpu().numpy()

    def _image_forward(self, frames_BHWC: torch.Tensor) -> torch.Tensor:
        pixels = normalised(frames_BHWC.to(self.device, non_blocking=True), self.mean, self.std)
        vec_BD: torch.Tensor = self.model.encode_image(pixels.to(self.image_dtype))
        return vec_BD.float()

    @torch.inference_mode()
    def texts(self, captions: Sequence[str], batch: int) -> Float32s:
        """Vectors of captions; equal captions go through the tower once.

        Captions of similar length share a batch, which ends with the last token that any of them needs: a causal tower
        gives the same vector as at full length.

        Args:
            captions: any text.
            batch: captions of one forward pass.

        Returns:
            float32, shape (len(captions), D).
        """
        if not captions:
            return np.empty((0, self.dims), np.float32)
        distinct, inverse = np.unique(np.array(captions, object), return_inverse=True)
        tokens_ML = self._tokens(distinct.tolist())
        length_M = self._lengths(tokens_ML)
        vec_MD = np.empty((len(distinct), self.dims), np.float32)
        for rows in batches(length_M, batch):
            tokens_BL = tokens_ML[torch.from_numpy(rows), : int(length_M[rows].max())]
            vec_MD[rows] = self._in_halves(self._text_forward, tokens_BL).cpu().numpy()
        return vec_MD[inverse]

    @torch.inference_mode()
    def _text_forward(self, tokens_BL: torch.Tensor) -> torch.Tensor:
        if self.causal_mask is not None:
            length = tokens_BL.shape[1]
            self.model.text.attn_mask = self.causal_mask[:length, :length]
        vec_BD: torch.Tensor = self.model.encode_text(tokens_BL.to(self.device))
        return vec_BD.float()

    def _tokens(self, captions: list[str]) -> torch.Tensor:
        """int64 (M, L) tokens, at the full context length L."""
        if len(getattr(self.tokenizer, "cache", ())) > CACHED_WORDS:
            self.tokenizer.cache = {word: word for word in ("<start_of_text>", "<end_of_text>")}
        chars = CHARS_PER_TOKEN * (self.tokenizer.context_length or 77)
        tokens_ML: torch.Tensor = self.tokenizer([caption[:chars] for caption in captions])
        return tokens_ML

    def _lengths(self, tokens_ML: torch.Tensor) -> NDArray[np.int64]:
        """int64 (M,): leading tokens that the vector of a caption depends on."""
        if self.causal_mask is None:
            return np.full(len(tokens_ML), tokens_ML.shape[1])
        text = self.model.text
        end = tokens_ML.argmax(1) if text.pool_type == "argmax" else (tokens_ML == text.eos_id).int().argmax(1)
        return end.numpy() + 1

    def _in_halves(self, forward: Callable[[torch.Tensor], torch.Tensor], batch: torch.Tensor) -> torch.Tensor:
        parts = in_halves(forward, batch)
        self.halved += len(parts) - 1
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def normalised(frames_BHWC: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """The last two steps of open_clip's transform (to tensor, normalise), for a batch at once.

    Args:
        frames_BHWC: uint8.
        mean, std: float32, shape (3,), of levels in [0, 1].

    Returns:
        float32, shape (B, 3, height, width), channels last in memory.
    """
    width = frames_BHWC.shape[2]
    # By whole rows of pixels: over the three channels alone, which lie side by side, this takes ten times as long.
    pixels = frames_BHWC.flatten(2).to(torch.float32)
    torch.addcmul((-mean / std).repeat(width), pixels, (1 / (255 * std)).repeat(width), out=pixels)
    return pixels.view(frames_BHWC.shape).permute(0, 3, 1, 2)


def batches(length_M: NDArray[np.int64], size: int) -> list[NDArray[np.int64]]:
    """Rows of similar length, at most `size` at a time, shortest first.

    Lengths in one batch differ by less than LENGTH_STEP, so that a single long caption does not pad hundreds.
    """
    order = np.argsort(length_M, kind="stable")
    steps = np.split(order, np.flatnonzero(np.diff((length_M[order] - 1) // LENGTH_STEP)) + 1)
    return [step[start : start + size] for step in steps for start in range(0, len(step), size)]


def in_halves(forward: Callable[[torch.Tensor], torch.Tensor], batch: torch.Tensor) -> list[torch.Tensor]:
    """Results of a forward pass over a batch, in one part or, where memory does not suffice, in as many as it takes.

    Raises:
        torch.OutOfMemoryError, RuntimeError: not even one row fits; or what else `forward` raises.
    """
    try:
        return [forward(batch)]
    except (torch.OutOfMemoryError, RuntimeError, MemoryError) as error:
        if len(batch) == 1 or not _out_of_memory(error):
            raise
    torch.cuda.empty_cache()  # outside of the handler, which keeps the failed pass's tensors alive
    log.warning("a batch of %d does not fit into memory and is halved", len(batch))
    half = len(batch) // 2
    return in_halves(forward, batch[:half]) + in_halves(forward, batch[half:])


def _out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def _load(weights: Weights) -> Any:
    """The model, ready to infer. With a text tower of its own, so that it can be run at less than full length."""
    hub = weights.arch.startswith(HUB)
    transform = dict(open_clip.get_pretrained_cfg(weights.arch, weights.source))
    transform.pop("size", None)  # the architecture's
    try:
        model = open_clip.create_model(
            weights.arch,
            pretrained=None if hub else weights.path,
            force_custom_text=True,
            force_quick_gelu=weights.quick_gelu,
            force_preprocess_cfg=transform,
            require_pretrained=True,
            weights_only=True,
        )
    except UnpicklingError:
        raise UserError(f"weights: {weights.path!r}: holds more than weights; it was not loaded") from None
    except ImportError as error:
        raise UserError(f"arch: {weights.arch} needs a package that is not installed: {error.name}") from None
    except (RuntimeError, OSError, ValueError, KeyError, EOFError, StopIteration, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"weights: {weights.path!r}: cannot be loaded as {weights.arch}: {reason}") from None
    return model.eval().to(memory_format=torch.channels_last)


def _noise(framing: Framing) -> torch.Tensor:
    """float32 (2, 3, height, width): pixels that show whether two towers are one."""
    return torch.randn(2, 3, *framing.size, generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def folded(tower: Any, pixels_BCHW: torch.Tensor) -> Any:
    """An image tower with each batch normalisation folded into the convolution before it: a fifth faster.

    Args:
        tower: in float32, ready to infer.
        pixels_BCHW: float32; both towers are tried on them.

    Returns:
        A copy whose vectors differ by rounding only; or `tower` itself, where they differ by more because the
        convolution that stands before a normalisation is not what it normalises.
    """
    found = copy.deepcopy(tower)
    for parent in found.modules():
        for (before, conv), (after, norm) in pairwise(list(parent.named_children())):
            if isinstance(conv, torch.nn.Conv2d) and isinstance(norm, torch.nn.BatchNorm2d):
                setattr(parent, before, fuse_conv_bn_eval(conv, norm))
                setattr(parent, after, getattr(norm, "act", torch.nn.Identity()))  # timm's bring their activation
    same = torch.allclose(found(pixels_BCHW), tower(pixels_BCHW), rtol=1e-3, atol=1e-4)
    return found if same else tower


def _tokenizer(weights: Weights) -> Any:
    bpe = {"bpe_path": str(tiny.BPE)} if weights.source == "tiny" else {}
    try:
        return open_clip.get_tokenizer(weights.arch, **bpe)
    except ImportError as error:
        raise UserError(f"arch: {weights.arch} needs a package that is not installed: {error.name}") from None
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"arch: the tokenizer of {weights.arch} cannot be loaded: {error}") from None


def causal_mask(text: Any) -> torch.Tensor | None:
    """The mask of a tower whose vector depends on nothing after its end-of-text token; None for any other."""
    if type(text) is not TextTransformer or text.cls_emb is not None or text.pool_type not in ("argmax", "eos"):
        return None
    mask: torch.Tensor | None = text.attn_mask
    return mask
