"""Encoding: equal to open_clip called by hand, and every wrong name or file is one clear message."""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from safetensors.torch import save_file
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import center_crop, resize

from pipeline import tiny
from pipeline.encode import (
    Encoder,
    Framing,
    Numerics,
    Weights,
    batches,
    folded,
    in_halves,
    normalised,
    numerics,
    resolve,
)
from pipeline.errors import UserError
from pipeline.machine import Machine
from tests import models

CPU = Machine(device="cpu", precision="float32")
FLOAT32 = Numerics("cpu", "float32", "")
CAPTIONS = [
    "a red cat",
    "",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich 🦊",
    "one",
    "two words",
    "yes",
    "word " * 200,
    "a red cat",
    "&lt;b&gt; entities   and\tspaces &amp;amp;",
    "a photo of a dog that sits beside a lake in the evening sun",
]


def pictures() -> list[Image.Image]:
    """Images of many shapes and modes; smooth, so that a shifted crop or another filter shows."""
    images = []
    for number, (width, height) in enumerate([(64, 48), (48, 64), (32, 32), (31, 33), (300, 20), (7, 9), (500, 333)]):
        y, x = np.mgrid[0:height, 0:width]
        waves = [np.sin(x / 7 + number), np.cos(y / 5), np.sin((x + y) / 11)]
        rgb = np.stack([(wave + 1) * 127 for wave in waves], axis=-1).astype(np.uint8)
        images.append(Image.fromarray(rgb))
    smooth = images[6]
    return [*images, *(smooth.convert(mode) for mode in ("L", "P", "RGBA", "CMYK", "LA", "1", "YCbCr"))]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {arch: models.make(folder, arch) for arch in models.CONFIGS}


@pytest.fixture(scope="module")
def encoders(files: dict[str, Path]) -> dict[str, Encoder]:
    return {arch: Encoder(resolve(arch, str(path)), FLOAT32, 1) for arch, path in files.items()}


def by_hand(arch: str, path: Path) -> tuple[Any, Any, Any]:
    model, _, transform = open_clip.create_model_and_transforms(arch, pretrained=str(path))
    return model.eval(), transform, open_clip.get_tokenizer(arch)


def cosines(a_ND: np.ndarray, b_ND: np.ndarray) -> np.ndarray:
    a_ND, b_ND = a_ND.astype(np.float64), b_ND.astype(np.float64)
    return (a_ND * b_ND).sum(1) / np.linalg.norm(a_ND, axis=1) / np.linalg.norm(b_ND, axis=1)


def frames(encoder: Encoder, images: list[Image.Image]) -> np.ndarray:
    frame = encoder.framing.build()
    return np.stack([frame(image.copy()) for image in images])


@pytest.mark.parametrize("arch", models.CONFIGS)
def test_images_equal_open_clip_called_by_hand(arch: str, files: dict[str, Path], encoders: dict[str, Encoder]) -> None:
    model, transform, _ = by_hand(arch, files[arch])
    images = pictures()
    with torch.no_grad():
        expected = model.encode_image(torch.stack([transform(image) for image in images])).numpy()
    vec_ND = encoders[arch].images(frames(encoders[arch], images))()
    assert vec_ND.dtype == np.float32
    assert vec_ND.shape == (len(images), encoders[arch].dims)
    assert cosines(vec_ND, expected).min() > 0.99999
    assert np.abs(vec_ND - expected).max() < 1e-3 * np.abs(expected).max()


@pytest.mark.parametrize("arch", models.CONFIGS)
def test_texts_equal_open_clip_called_by_hand_at_full_length(
    arch: str, files: dict[str, Path], encoders: dict[str, Encoder]
) -> None:
    model, _, tokenizer = by_hand(arch, files[arch])
    with torch.no_grad():
        expected = model.encode_text(tokenizer(CAPTIONS)).numpy()
    assert len(np.unique(expected.round(4), axis=0)) == len(set(CAPTIONS))
    for batch in (1, 3, 256):
        vec_ND = encoders[arch].texts(CAPTIONS, batch)
        assert vec_ND.dtype == np.float32
        assert cosines(vec_ND, expected).min() > 0.99999


@pytest.mark.parametrize("arch", models.CONFIGS)
def test_bf16_is_close_to_float32(arch: str, files: dict[str, Path], encoders: dict[str, Encoder]) -> None:
    exact = encoders[arch]
    coarse = Encoder(resolve(arch, str(files[arch])), Numerics("cpu", "bf16", ""), 1)
    framed = frames(exact, pictures())
    images = cosines(coarse.images(framed)(), exact.images(framed)()).min()
    assert images > 0.999 if arch != "tiny-test-timm" else images > 0.999999
    assert coarse.image_dtype == (torch.bfloat16 if arch != "tiny-test-timm" else torch.float32)
    assert 0.999 < cosines(coarse.texts(CAPTIONS, 4), exact.texts(CAPTIONS, 4)).min() < 1


@pytest.mark.parametrize("arch", models.CONFIGS)
def test_only_a_causal_tower_that_pools_its_last_token_is_cut(arch: str, encoders: dict[str, Encoder]) -> None:
    encoder = encoders[arch]
    tokens = encoder._tokens(["one", "a red cat"])
    cut = arch in ("tiny-test-vit", "tiny-test-quick", "tiny-test-timm")
    assert encoder._lengths(tokens).tolist() == ([3, 5] if cut else [tokens.shape[1]] * 2)


def test_equal_captions_go_through_the_tower_once(encoders: dict[str, Encoder]) -> None:
    encoder = encoders["tiny-test-vit"]
    seen: list[int] = []
    handle = encoder.model.text.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    vec_ND = encoder.texts(["one", "two", "one", "one"], 256)
    handle.remove()
    assert seen == [2]
    assert np.array_equal(vec_ND[0], vec_ND[2]) and not np.array_equal(vec_ND[0], vec_ND[1])


def test_tiny_equals_open_clip_called_by_hand() -> None:
    encoder = Encoder(resolve(None, "tiny"), FLOAT32, 1)
    model, transform, _ = by_hand(tiny.ARCH, tiny.WEIGHTS)
    tokenizer = open_clip.get_tokenizer(tiny.ARCH, bpe_path=str(tiny.BPE))
    with torch.no_grad():
        images = model.encode_image(torch.stack([transform(image) for image in pictures()])).numpy()
        texts = model.encode_text(tokenizer(CAPTIONS)).numpy()
    assert cosines(encoder.images(frames(encoder, pictures()))(), images).min() > 0.9999
    assert cosines(encoder.texts(CAPTIONS, 4), texts).min() > 0.9999


def test_a_norm_is_folded_into_its_convolution_by_hand() -> None:
    conv, norm = torch.nn.Conv2d(1, 1, 1), torch.nn.BatchNorm2d(1, eps=0)
    for parameter, value in ((conv.weight, 3), (conv.bias, 1), (norm.weight, 8), (norm.bias, 5)):
        torch.nn.init.constant_(parameter, value)
    norm.running_mean.fill_(2)
    norm.running_var.fill_(16)
    tower = torch.nn.Sequential(conv, norm, torch.nn.ReLU()).eval()
    found = folded(tower, torch.ones(2, 1, 2, 2))
    assert found[0].weight.item() == 6  # 3 * 8 / sqrt(16)
    assert found[0].bias.item() == 3  # (1 - 2) * 8 / sqrt(16) + 5
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in found.modules())
    assert norm.bias.item() == 5 and tower[1] is norm


def test_a_convolution_network_keeps_its_activations_and_loses_its_norms(files: dict[str, Path]) -> None:
    arch = "tiny-test-timm"
    tower = open_clip.create_model(arch, pretrained=str(files[arch])).visual.eval()
    pixels = torch.randn(3, 3, 48, 48)
    found = folded(tower, pixels)
    kinds = [type(module).__name__ for module in found.modules()]
    assert not any("BatchNorm" in kind for kind in kinds) and kinds.count("SiLU") > 4
    with torch.no_grad():
        assert cosines(found(pixels).numpy(), tower(pixels).numpy()).min() > 0.999999


def test_a_norm_of_something_else_than_the_convolution_before_it_is_left_alone() -> None:
    class Crossed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = torch.nn.Conv2d(3, 3, 1), torch.nn.BatchNorm2d(3)
            self.norm.running_var.fill_(4)

        def forward(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
            return self.conv(self.norm(pixels_BCHW))

    tower = Crossed().eval()
    assert folded(tower, torch.ones(2, 3, 4, 4)) is tower


PAGES = """
import ctypes, resource, sys
from pipeline.machine import keep_freed_memory

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes, libc.free.argtypes = [ctypes.c_size_t], [ctypes.c_void_p]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
layers, size = int(sys.argv[1]), int(sys.argv[2]) << 20

def batch():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [libc.malloc(size) for _ in range(layers)]
    for block in blocks:
        libc.memset(block, 1, size)
    for block in blocks:
        libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

keep_freed_memory()
print(min(batch() for _ in range(8)))
"""


@pytest.mark.parametrize(("layers", "mib"), [(1, 24), (1, 90), (6, 90)])
def test_memory_that_a_batch_freed_serves_the_next_without_new_pages(layers: int, mib: int) -> None:
    # In a process of its own: with something in use behind it, glibc gives nothing back anyway.
    script = [sys.executable, "-c", PAGES, str(layers), str(mib)]
    assert int(subprocess.run(script, check=True, capture_output=True, text=True).stdout) < 100


def test_batches_by_hand() -> None:
    lengths = np.array([3, 77, 4, 5, 3, 8, 9, 1])
    assert [rows.tolist() for rows in batches(lengths, 3)] == [[7, 0, 4], [2], [3, 5], [6], [1]]
    assert [rows.tolist() for rows in batches(lengths, 9)] == [[7, 0, 4, 2], [3, 5], [6], [1]]
    assert [rows.tolist() for rows in batches(np.full(5, 77), 2)] == [[0, 1], [2, 3], [4]]


def test_no_captions_give_no_rows(encoders: dict[str, Encoder]) -> None:
    assert encoders["tiny-test-vit"].texts([], 8).shape == (0, 24)


def test_only_the_start_of_a_huge_caption_is_tokenized(encoders: dict[str, Encoder]) -> None:
    tokens = encoders["tiny-test-vit"]._tokens(["", " " * 64 * 77 + "late", " " * 63 * 77 + "in time"])
    assert torch.equal(tokens[0], tokens[1]) and not torch.equal(tokens[0], tokens[2])


def test_a_tag_brings_its_transform(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    tag = {"file": str(files["tiny-test-vit"]), "mean": (0.5, 0.4, 0.3), "interpolation": "bilinear"}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny-test-vit", {"mine": tag})
    found = resolve("tiny-test-vit", "mine")
    assert found.source == "mine"
    encoder = Encoder(found, FLOAT32, 1)
    assert encoder.framing.interpolation == "bilinear"
    model, _, transform = open_clip.create_model_and_transforms("tiny-test-vit", pretrained="mine")
    with torch.no_grad():
        expected = model.eval().encode_image(torch.stack([transform(image) for image in pictures()])).numpy()
    vec_ND = encoder.images(frames(encoder, pictures()))()
    assert np.abs(vec_ND - expected).max() < 1e-4 * np.abs(expected).max()


FRAMINGS = [
    Framing((32, 32), "bicubic", "shortest", 0),
    Framing((32, 32), "bilinear", "shortest", 0),
    Framing((40, 32), "bicubic", "squash", 0),
    Framing((32, 32), "bicubic", "longest", 7),
    Framing((24, 40), "bicubic", "shortest", 0),
]


@pytest.mark.parametrize("framing", FRAMINGS)
def test_a_frame_is_that_of_open_clips_transform(framing: Framing) -> None:
    transform = image_transform_v2(
        PreprocessCfg(
            size=framing.size,
            interpolation=framing.interpolation,
            resize_mode=framing.resize_mode,
            fill_color=framing.fill_color,
            mean=(0, 0, 0),
            std=(1, 1, 1),
        ),
        is_train=False,
    )
    frame = framing.build()
    for image in pictures():
        expected = transform(image).mul(255).round().to(torch.uint8).permute(1, 2, 0).numpy()
        apart = np.abs(frame(image).astype(int) - expected)
        assert apart.max() <= (image.mode == "RGB")
        assert apart.mean() < 0.02
        if image.mode == "RGB":
            assert np.array_equal(frame(np.array(image)), frame(image))


@pytest.mark.parametrize("size", [(341, 256), (224, 224), (100, 90), (1, 7), (2200, 2000), (3000, 1500)])
@pytest.mark.parametrize("framing", [FRAMINGS[0], Framing((24, 40), "bilinear", "squash", 0)])
def test_an_rgb_frame_is_what_torchvision_makes_of_a_copy(size: tuple[int, int], framing: Framing) -> None:
    width, height = size
    levels = np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8)
    image = Image.fromarray(levels)
    square = framing.resize_mode == "shortest"
    expected = resize(
        torch.from_numpy(levels.copy()).permute(2, 0, 1),
        [framing.size[0]] if square else list(framing.size),
        InterpolationMode(framing.interpolation),
    )
    expected = center_crop(expected, list(framing.size)) if square else expected
    before = levels.copy()
    for given in (image, levels):
        assert np.array_equal(framing.build()(given), expected.permute(1, 2, 0).numpy())
        assert np.array_equal(np.asarray(given), before)


@pytest.mark.parametrize(
    ("width", "height", "rows", "columns"),
    [
        pytest.param(80, 40, slice(0, 40), slice(20, 60), id="64 x 32, from 16 to 48: at 20 and 60"),
        pytest.param(40, 57, slice(8, 48), slice(0, 40), id="32 x 45, from 6 to 38: at 7.6 and 48.1"),
        pytest.param(33, 32, slice(0, 32), slice(0, 32), id="33 x 32, from 0 to 32: as they are"),
        pytest.param(32, 32, slice(0, 32), slice(0, 32), id="all of it"),
    ],
)
def test_a_fast_frame_is_of_what_becomes_the_middle_square(
    width: int, height: int, rows: slice, columns: slice
) -> None:
    levels = np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8)
    expected = Framing((32, 32), "bicubic", "squash", 0).build()(levels[rows, columns])
    for given in (levels, Image.fromarray(levels)):
        assert np.array_equal(Framing((32, 32), "bicubic", "shortest", 0).build(fast=True)(given), expected)


@pytest.mark.parametrize("framing", [FRAMINGS[2], FRAMINGS[3], FRAMINGS[4]])
def test_what_is_no_square_cut_from_the_middle_is_framed_as_ever(framing: Framing) -> None:
    levels = np.random.default_rng(0).integers(0, 256, (57, 90, 3), np.uint8)
    assert np.array_equal(framing.build(fast=True)(levels), framing.build()(levels))


def test_a_batch_is_normalised_by_hand() -> None:
    frames_BHWC = torch.tensor([[[[0, 255, 51]], [[255, 0, 102]]]], dtype=torch.uint8)
    found = normalised(frames_BHWC, torch.tensor([0.5, 0.25, 0.2]), torch.tensor([0.5, 0.25, 0.1]))
    assert found.shape == (1, 3, 2, 1) and found.is_contiguous(memory_format=torch.channels_last)
    expected = torch.tensor([[[[-1.0], [1]], [[3], [-1]], [[0], [2]]]])
    assert torch.allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("size", [(1, 60000), (60000, 1), (3, 40000)])
def test_an_extremely_thin_image_is_framed_from_its_middle(size: tuple[int, int]) -> None:
    image = Image.new("RGB", size, "red")
    middle = tuple(side // 2 - 8 if side > 3 else 0 for side in size)
    image.paste("blue", (*middle, *(m + 16 for m in middle)))
    for given in (image, np.array(image)):
        found = Framing((224, 224), "bicubic", "shortest", 0).build()(given)
        assert found.shape == (224, 224, 3)
        assert (found.reshape(-1, 3).mean(0).round() == (0, 0, 255)).all()


def test_palette_transparency_is_dropped_in_silence() -> None:
    buffer = io.BytesIO()
    pictures()[6].convert("P").save(buffer, "PNG", transparency=bytes(range(256)))
    with_alpha, without = Image.open(buffer), pictures()[6].convert("P")
    frame = FRAMINGS[0].build()
    assert np.array_equal(frame(with_alpha), frame(without))


def short_of_memory(limit: int, error: type[Exception], message: str) -> Any:
    """A forward pass on a device that holds `limit` rows; and the sizes of the batches that it saw."""
    seen: list[int] = []

    def forward(batch: torch.Tensor) -> torch.Tensor:
        seen.append(len(batch))
        if len(batch) > limit:
            raise error(message)
        return batch * 2

    return forward, seen


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (torch.OutOfMemoryError, "CUDA out of memory"),
        (RuntimeError, "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        (MemoryError, ""),
    ],
)
def test_a_batch_that_does_not_fit_is_halved_until_it_does(error: type[Exception], message: str) -> None:
    forward, seen = short_of_memory(3, error, message)
    parts = in_halves(forward, torch.arange(10))
    assert torch.cat(parts).tolist() == [2 * i for i in range(10)]
    assert [len(part) for part in parts] == [2, 3, 2, 3]
    assert seen == [10, 5, 2, 3, 5, 2, 3]


def test_a_single_row_that_does_not_fit_is_an_error() -> None:
    forward, _ = short_of_memory(0, torch.OutOfMemoryError, "CUDA out of memory")
    with pytest.raises(torch.OutOfMemoryError):
        in_halves(forward, torch.arange(4))


def test_other_failures_are_not_retried() -> None:
    forward, seen = short_of_memory(3, RuntimeError, "shapes do not match")
    with pytest.raises(RuntimeError, match="shapes"):
        in_halves(forward, torch.arange(10))
    assert seen == [10]


def test_halved_batches_are_counted_and_equal(encoders: dict[str, Encoder]) -> None:
    encoder = encoders["tiny-test-vit"]
    framed = frames(encoder, pictures())
    whole, before = encoder.images(framed)(), encoder.halved

    def small(module: torch.nn.Module, args: tuple[torch.Tensor]) -> None:
        if len(args[0]) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")

    handle = encoder.model.visual.register_forward_pre_hook(small)
    halves = encoder.images(framed)()
    handle.remove()
    assert encoder.halved - before == 3
    assert cosines(whole, halves).min() > 0.99999


def test_a_file_is_known_by_its_digest_and_its_architecture(files: dict[str, Path]) -> None:
    path = files["tiny-test-vit"]
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert resolve("tiny-test-vit", str(path)) == Weights("tiny-test-vit", "file", str(path), digest)


def test_a_pt_file_of_weights_gives_the_same_vectors(
    files: dict[str, Path], encoders: dict[str, Encoder], tmp_path: Path
) -> None:
    model, _, _ = by_hand("tiny-test-vit", files["tiny-test-vit"])
    torch.save({"state_dict": model.state_dict(), "epoch": 3}, tmp_path / "epoch_3.pt")
    encoder = Encoder(resolve("tiny-test-vit", str(tmp_path / "epoch_3.pt")), FLOAT32, 1)
    assert np.array_equal(encoder.texts(CAPTIONS, 4), encoders["tiny-test-vit"].texts(CAPTIONS, 4))


class Malicious:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


@pytest.mark.goal("S-a")
@pytest.mark.parametrize("wrap", [lambda bad: bad, lambda bad: {"state_dict": {"logit_scale": bad}}])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_holds_more_than_weights_is_refused(
    wrap: Any, zipped: bool, files: dict[str, Path], tmp_path: Path
) -> None:
    canary = tmp_path / "canary"
    path = tmp_path / "model.pt"
    torch.save(wrap(Malicious(f"touch {canary}")), path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match="holds more than weights; it was not loaded"):
        Encoder(resolve("tiny-test-vit", str(path)), FLOAT32, 1)
    assert not canary.exists()
    torch.load(path, weights_only=False)
    assert canary.exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [("cut.safetensors", b"\x08\0\0\0\0\0\0\0{}"), ("text.pt", b"hello"), ("empty.pt", b""), ("zip.bin", b"PK\3\4")],
)
def test_a_damaged_file_is_one_message(name: str, content: bytes, files: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=name):
        Encoder(resolve("tiny-test-vit", str(tmp_path / name)), FLOAT32, 1)


def test_weights_of_another_architecture_are_one_message(files: dict[str, Path]) -> None:
    with pytest.raises(UserError, match="cannot be loaded as tiny-test-coca: Error"):
        Encoder(resolve("tiny-test-coca", str(files["tiny-test-vit"])), FLOAT32, 1)


def test_weights_that_lack_a_tensor_are_one_message(files: dict[str, Path], tmp_path: Path) -> None:
    save_file({"logit_scale": torch.zeros(())}, tmp_path / "scale.safetensors")
    with pytest.raises(UserError, match="Missing key"):
        Encoder(resolve("tiny-test-vit", str(tmp_path / "scale.safetensors")), FLOAT32, 1)


@pytest.mark.parametrize(
    ("arch", "weights", "message"),
    [
        ("ViT-B32", "openai", "arch: open_clip has no architecture 'ViT-B32'; did you mean 'ViT-B-32'?"),
        (
            "ViT-B-32",
            "laion2b",
            "is no .safetensors, .pt, .pth, .bin file, and no tag of ViT-B-32; did you mean 'laion2b",
        ),
        ("ViT-B-32", "laion2b_s34b_b79", "did you mean 'laion2b_s34b_b79k'?"),
        ("ViT-B-32", "model.safetensors", "weights: there is no file 'model.safetensors'"),
        (
            "ViT-B-32",
            "model.npz",
            "weights: 'model.npz' is no .safetensors, .pt, .pth, .bin file, and no tag of ViT-B-32; known: ",
        ),
        ("ViT-S-32-alt", "x", "file, and no tag of ViT-S-32-alt; it has no tags"),
        (None, "openai", "arch: required for weights 'openai'"),
        ("ViT-B-32", "tiny", "arch: weights 'tiny' bring their own, leave it out"),
    ],
)
def test_a_wrong_name_is_one_message(arch: str | None, weights: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        resolve(arch, weights)
    assert message in str(caught.value)


@pytest.fixture
def hub(files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without a network whose cache holds one model of the hub; the path of its weights."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / "models--org--model"
    snapshot = folder / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0" * 40)
    config = files["tiny-test-vit"].with_suffix(".json").read_text()
    (snapshot / "open_clip_config.json").write_text(
        '{"model_cfg": ' + config + ', "preprocess_cfg": {"fill_color": 9}}'
    )
    weights = snapshot / "open_clip_model.safetensors"
    weights.write_bytes(files["tiny-test-vit"].read_bytes())
    return weights


def test_a_hub_model_brings_its_architecture_and_transform(hub: Path, encoders: dict[str, Encoder]) -> None:
    found = resolve(None, "hf-hub:org/model")
    digest = hashlib.sha256(hub.read_bytes()).hexdigest()
    assert found == Weights("hf-hub:org/model", "hf-hub:org/model", str(hub), digest)
    encoder = Encoder(found, FLOAT32, 1)
    assert encoder.framing.fill_color == 9
    assert np.array_equal(encoder.texts(CAPTIONS, 4), encoders["tiny-test-vit"].texts(CAPTIONS, 4))
    assert resolve("tiny-test-vit", "hf-hub:org/model") == found


def test_a_hub_model_of_another_architecture_than_stated_is_one_message(hub: Path) -> None:
    with pytest.raises(UserError, match="arch: hf-hub:org/model is no ViT-L-14; leave arch out, the hub says what"):
        resolve("ViT-L-14", "hf-hub:org/model")


@pytest.mark.parametrize(("arch", "weights"), [(None, "hf-hub:org/absent"), ("ViT-B-32", "openai")])
def test_without_a_network_there_is_one_message(hub: Path, arch: str | None, weights: str) -> None:
    with pytest.raises(UserError) as caught:
        resolve(arch, weights)
    assert str(caught.value).startswith(
        f"weights: {weights!r} could not be downloaded, and are not in the local cache ("
    )
    assert str(caught.value).endswith(". Without a network, give a local .safetensors or .pt file")


def test_a_tag_trained_with_quick_gelu_forces_it(hub: Path, files: dict[str, Path]) -> None:
    tagged = open_clip.get_pretrained_cfg("ViT-B-32", "openai")["hf_hub"].strip("/").replace("/", "--")
    snapshot = hub.parents[3] / f"models--{tagged}" / "snapshots" / ("1" * 40)
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("1" * 40)
    (snapshot / "open_clip_model.safetensors").write_bytes(b"weights")
    assert resolve("ViT-B-32", "openai").quick_gelu
    assert not resolve("ViT-B-32-quickgelu", "openai").quick_gelu


def test_a_forced_quick_gelu_computes_as_the_architecture_that_has_it(
    files: dict[str, Path], encoders: dict[str, Encoder]
) -> None:
    path = files["tiny-test-quick"]
    forced = Encoder(Weights("tiny-test-vit", "file", str(path), "", quick_gelu=True), FLOAT32, 1)
    without = Encoder(Weights("tiny-test-vit", "file", str(path), ""), FLOAT32, 1)
    framed = frames(forced, pictures())
    expected = encoders["tiny-test-quick"].images(framed)()
    assert np.array_equal(forced.images(framed)(), expected)
    assert cosines(without.images(framed)(), expected).min() < 0.99998


def test_a_demanded_gpu_or_precision_that_is_not_there_is_one_message() -> None:
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="cuda is demanded, but torch finds no GPU"):
            numerics(Machine(device="cuda"))
    with pytest.raises(UserError, match="fp16 needs a GPU"):
        numerics(Machine(device="cpu", precision="fp16"))


def test_numerics_name_the_processor_and_torch_and_honour_the_precision() -> None:
    found = numerics(CPU)
    assert (found.device, found.precision) == ("cpu", "float32")
    assert found.kind.startswith("cpu ")
    assert found.kind.endswith(f"torch {torch.__version__.split('+')[0]}")
    assert numerics(Machine(device="cpu", precision="bf16")).precision == "bf16"
    assert numerics(Machine(device="cpu")).precision in ("bf16", "float32")
