"""Embedding a unit: aligned with its samples, equal to the models called by hand, every undecodable image a problem."""

from __future__ import annotations

import io
import logging
import tarfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pyarrow as pa
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from pipeline.arrow import unfixed, valid
from pipeline.embed import Clock, Embed, ahead, embed, framer, together
from pipeline.encode import Encoder, Framing, numerics, resolve
from pipeline.formats import webdataset
from pipeline.machine import Machine
from pipeline.run import stage_key
from pipeline.schema import embeddings
from pipeline.stage import LocalFile, Made
from pipeline.state import Verdict
from pipeline.vectors import row_cosine, unit16
from tests import models, steps

MACHINE = Machine(device="cpu", precision="float32", image_batch=4, text_batch=3)
FLOAT32 = numerics(MACHINE)


@dataclass(frozen=True)
class TarFiles:
    """stage.Files of a unit that is one local tar; counts how often it is opened."""

    path: Path

    def __contains__(self, role: str) -> bool:
        return role == "tar"

    def open(self, role: str) -> LocalFile:
        return LocalFile(str(self.path), self.path.stat().st_size, "")

    def read(self, role: str, ranges: Sequence[tuple[int, int]]) -> Iterator[bytes]:
        data = self.path.read_bytes()
        return iter([data[start:stop] for start, stop in ranges])


@dataclass(frozen=True)
class TableRows:
    """stage.Rows of one table at hand."""

    rows: pa.Table
    facts: tuple[dict[str, Any], ...] = ()
    given: Any = None
    lengths: tuple[int, ...] = ()

    def table(self, columns: Sequence[str] | None = None) -> pa.Table:
        return self.rows if columns is None else self.rows.select(columns)

    def pieces(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        yield self.table(columns)


def picture(number: int, width: int = 60, height: int = 40) -> Image.Image:
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / (3 + number)), np.cos(y / 5 + number), np.sin((x + y) / (2 + number))]
    return Image.fromarray(np.stack([(wave + 1) * 127 for wave in waves], axis=-1).astype(np.uint8))


def stored(image: Image.Image, kind: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def bomb() -> bytes:
    """A PNG header of 20000 x 20000 px."""
    good = bytearray(stored(picture(0), "PNG"))
    good[16:24] = (20000).to_bytes(4, "big") * 2
    head = bytes(good[12:29])
    good[29:33] = zlib.crc32(head).to_bytes(4, "big")
    return bytes(good)


SHARD: list[tuple[str, bytes | None, str | None]] = [
    ("000", stored(picture(0)), "a cat"),
    ("001", stored(picture(1), "PNG"), "a dog in the rain"),
    ("002", stored(picture(2))[:300], "cut"),
    ("003", stored(picture(3)), "a cat"),
    ("004", bomb(), "a bomb"),
    ("005", None, "no image"),
    ("006", stored(picture(6)), None),
    ("007", stored(picture(7), "WEBP"), "long " * 100),
    ("008", stored(picture(8, 200, 30)), "wide"),
    ("009", stored(picture(9).convert("L")), "grey"),
    ("010", stored(picture(10).convert("RGBA"), "PNG"), "alpha"),
]
GOOD = [0, 1, 3, 7, 8, 9, 10]


@pytest.fixture(scope="module")
def unit(tmp_path_factory: pytest.TempPathFactory) -> tuple[TarFiles, TableRows, TableRows]:
    path = tmp_path_factory.mktemp("pool") / "00000.tar"
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for key, image, caption in SHARD:
            for suffix, data in (("jpg", image), ("txt", caption.encode() if caption is not None else None)):
                if data is not None:
                    member = tarfile.TarInfo(f"{key}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    files = TarFiles(path)
    reading = webdataset.read(files)
    assert reading.samples["key"].to_pylist() == [key for key, _, _ in SHARD]
    return files, TableRows(reading.samples), TableRows(reading.columns)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {arch: models.make(folder, arch) for arch in ("tiny-test-vit", "tiny-test-quick", "tiny-test-timm")}


def stage(weights: dict[str, Path], arch: str = "tiny-test-vit", **changes: Any) -> Embed:
    found = embed("clip", resolve(arch, str(weights[arch])), FLOAT32, "webdataset", False, ())
    return replace(found, **changes)


def test_vectors_equal_open_clip_called_by_hand_and_stand_in_the_samples_rows(
    unit: tuple[Any, ...], weights: dict[str, Path]
) -> None:
    made = stage(weights).build(MACHINE)(*unit)
    table = steps.evidence(made)
    assert table.schema == embeddings(24)
    assert len(table) == len(SHARD)
    for column in ("image", "text", "score"):
        assert np.flatnonzero(valid(table[column])).tolist() == GOOD

    model, _, transform = open_clip.create_model_and_transforms(
        "tiny-test-vit", pretrained=str(weights["tiny-test-vit"])
    )
    model.eval()
    with torch.no_grad():
        pixels = torch.stack([transform(Image.open(io.BytesIO(SHARD[row][1] or b""))) for row in GOOD])
        expected = {
            "image": model.encode_image(pixels, normalize=True).numpy(),
            "text": model.encode_text(
                open_clip.get_tokenizer("tiny-test-vit")([SHARD[row][2] or "" for row in GOOD]), normalize=True
            ).numpy(),
        }
    for column, vec_ND in expected.items():
        stored_ND = unfixed(table[column], np.float16)[GOOD].astype(np.float64)
        assert np.abs(np.linalg.norm(stored_ND, axis=1) - 1).max() < 1e-3
        assert (stored_ND * vec_ND).sum(1).min() > 0.9999
        assert np.abs(stored_ND - vec_ND).max() < 1e-3
    image16, text16 = unfixed(table["image"], np.float16), unfixed(table["text"], np.float16)
    assert table["score"].to_numpy(zero_copy_only=False)[GOOD].tolist() == row_cosine(image16, text16)[GOOD].tolist()


def test_an_image_that_cannot_be_decoded_is_a_problem_of_its_row(
    unit: tuple[Any, ...], weights: dict[str, Path]
) -> None:
    table = steps.evidence(stage(weights).build(MACHINE)(*unit))
    problems = {row: p for row, p in enumerate(table["problem"].to_pylist()) if p}
    assert problems == {2: "unreadable_image", 4: "image_too_large"}
    assert table["detail"][4].as_py() == "20000 x 20000 px, at most 64000000 are decoded"
    assert unit[1].table()["problem"].to_pylist()[5:7] == ["missing_image", "missing_caption"]


def test_facts_count_rows_and_are_the_same_each_time(unit: tuple[Any, ...], weights: dict[str, Path]) -> None:
    function = stage(weights).build(MACHINE)
    assert function(*unit).facts == {"rows": 11, "embedded": 7, "dims": 24, "halved": 0}
    assert function(*unit).facts == function(*unit).facts


@pytest.mark.parametrize("decoders", [1, 3])
def test_the_bytes_do_not_depend_on_decoding_threads_or_on_units_before(
    decoders: int, unit: tuple[Any, ...], weights: dict[str, Path]
) -> None:
    first = stage(weights).build(MACHINE)(*unit)
    function = stage(weights).build(MACHINE.model_copy(update={"decoders": decoders}))
    assert steps.evidence(function(*unit)).equals(steps.evidence(first))
    assert steps.evidence(function(*unit)).equals(steps.evidence(first))


def test_models_together_give_what_each_gives_alone_from_one_decode(
    unit: tuple[Any, ...], weights: dict[str, Path]
) -> None:
    stages = [stage(weights, arch) for arch in weights]
    reads: list[int] = []

    class Counted(TarFiles):
        def read(self, role: str, ranges: Sequence[tuple[int, int]]) -> Iterator[bytes]:
            reads.append(len(ranges))
            return super().read(role, ranges)

    made = together(stages, MACHINE)(Counted(unit[0].path), *unit[1:])
    assert reads == [9]
    for one, result in zip(stages, made, strict=True):
        alone: Made = one.build(MACHINE)(*unit)
        assert steps.evidence(result).equals(steps.evidence(alone))
        assert result.facts == alone.facts


def test_equal_framings_share_their_frames() -> None:
    small, large = Framing((32, 32), "bicubic", "shortest", 0), Framing((48, 48), "bicubic", "shortest", 0)
    framed = framer([small, large], fast=False)(stored(picture(1)))
    assert isinstance(framed, tuple)
    assert [frame.shape for frame in framed] == [(32, 32, 3), (48, 48, 3)]


@pytest.mark.parametrize(
    ("size", "same"),
    [
        pytest.param((640, 480), False, id="scaled and cut"),
        pytest.param((41, 50), False, id="cut before it is resized"),
        pytest.param((40, 40), True, id="nothing to cut"),
        pytest.param((31, 50), True, id="smaller than the frame"),
    ],
)
def test_a_fast_frame_is_close_and_only_of_larger_images(size: tuple[int, int], same: bool) -> None:
    framing = Framing((32, 32), "bicubic", "shortest", 0)
    data = stored(picture(1, *size))
    exact, fast = (framer([framing], fast=fast)(data) for fast in (False, True))
    assert isinstance(exact, tuple) and isinstance(fast, tuple)
    assert np.array_equal(exact[0], fast[0]) == same
    assert np.abs(exact[0].astype(int) - fast[0]).mean() < 6


@dataclass(frozen=True)
class ShortCaptions:
    """A row rule: captions of at least so many characters. Refuses to judge a row that came to it dropped."""

    min_chars: int
    forbidden: str = "\0"

    def build(self, machine: Machine) -> Callable[[pa.Table, pa.Table], Verdict]:
        def judge(samples: pa.Table, columns: pa.Table) -> Verdict:
            captions = samples["caption"].to_pylist()
            assert len(columns) == len(samples)
            assert self.forbidden not in captions
            reason = pa.array(["short" if len(c) < self.min_chars else None for c in captions], pa.string())
            return Verdict(reason, pa.nulls(len(samples), pa.float64()), pa.nulls(len(samples), pa.float64()))

        return judge


def test_rows_that_leading_rules_drop_are_spared_and_no_problem(
    unit: tuple[Any, ...], weights: dict[str, Path]
) -> None:
    rules = (ShortCaptions(1), ShortCaptions(6, forbidden=""))
    made = stage(weights, spare=rules).build(MACHINE)(*unit)
    table = steps.evidence(made)
    assert np.flatnonzero(valid(table["image"])).tolist() == [1, 7]
    assert {row: p for row, p in enumerate(table["problem"].to_pylist()) if p} == {4: "image_too_large"}
    whole = steps.evidence(stage(weights).build(MACHINE)(*unit))
    assert np.allclose(table["score"].to_numpy()[[1, 7]], whole["score"].to_numpy()[[1, 7]], atol=1e-3)


def test_an_empty_unit_gives_an_empty_table(unit: tuple[Any, ...], weights: dict[str, Path]) -> None:
    files, samples, columns = unit
    nothing = TableRows(samples.rows.slice(0, 0)), TableRows(columns.rows.slice(0, 0))
    made = stage(weights).build(MACHINE)(files, *nothing)
    assert steps.evidence(made).equals(embeddings(24).empty_table())
    assert made.facts == {"rows": 0, "embedded": 0, "dims": 24, "halved": 0}


@pytest.mark.parametrize(("tensor", "side"), [("visual.proj", "image"), ("text_projection", "text")])
@pytest.mark.parametrize("value", [float("nan"), 0.0])
def test_a_vector_that_is_zero_or_not_finite_is_a_problem(
    tensor: str, side: str, value: float, unit: tuple[Any, ...], weights: dict[str, Path], tmp_path: Path
) -> None:
    state = load_file(weights["tiny-test-vit"])
    state[tensor].fill_(value)
    save_file(state, tmp_path / "bad.safetensors")
    table = steps.evidence(stage({"tiny-test-vit": tmp_path / "bad.safetensors"}).build(MACHINE)(*unit))
    assert not valid(table["image"]).any() and not valid(table["text"]).any() and not valid(table["score"]).any()
    for row in GOOD:
        assert table["problem"][row].as_py() == "bad_vector"
        assert table["detail"][row].as_py() == f"the {side} vector is zero or not finite"


@pytest.mark.goal("R18")
def test_a_worker_with_other_numerics_refuses_to_embed(weights: dict[str, Path]) -> None:
    with pytest.raises(RuntimeError, match=r"computes in float32 on .*, but .* 'clip' are asked for in bf16 on"):
        stage(weights, precision="bf16").build(MACHINE)
    with pytest.raises(RuntimeError, match="asked for in float32 on 'NVIDIA H100'"):
        stage(weights, device_class="NVIDIA H100").build(MACHINE)


@pytest.mark.goal("R18")
def test_a_worker_with_other_weights_refuses_to_embed(weights: dict[str, Path]) -> None:
    with pytest.raises(RuntimeError, match=r"has other weights for 'clip': .* has the sha256 .*, not 00ff"):
        stage(weights, sha256="00ff").build(MACHINE)


def test_stages_of_different_pools_do_not_go_together(weights: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="share format, spare and fast_decode"):
        together([stage(weights), stage(weights, format="parquet")], MACHINE)


def test_the_place_of_a_weights_file_is_not_part_of_the_stage(weights: dict[str, Path], tmp_path: Path) -> None:
    moved = tmp_path / "moved.safetensors"
    moved.write_bytes(weights["tiny-test-vit"].read_bytes())
    assert stage_key(stage({"tiny-test-vit": moved})) == stage_key(stage(weights))
    assert stage_key(stage(weights)) != stage_key(stage(weights, "tiny-test-quick"))


def test_the_log_says_where_the_time_went_and_nothing_of_the_samples(
    unit: tuple[Any, ...], weights: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    function = stage(weights).build(MACHINE)
    with caplog.at_level(logging.INFO, "pipeline.embed"):
        function(*unit)
    (line,) = caplog.messages
    assert line.startswith("7 of 11 rows embedded by 1 models; read 0.")
    assert all(word in line for word in ("decode ", "image ", "text "))


@pytest.mark.parametrize("decoders", [0, 2])
def test_the_first_of_what_is_made_tells_the_seconds_of_each_phase(
    decoders: int, unit: tuple[Any, ...], weights: dict[str, Path]
) -> None:
    machine = MACHINE.model_copy(update={"decoders": decoders})
    first, *others = together([stage(weights, arch) for arch in weights], machine)(*unit)
    assert list(first.seconds) == ["read", "decode", "image", "text"]
    assert min(first.seconds.values()) > 0
    assert not any(made.seconds for made in others)


def test_decoding_is_timed_by_the_processor_whichever_thread_does_it() -> None:
    clock = Clock()
    assert (
        list(ahead(clock.work("decode", lambda value: time.sleep(0.05) or sum(range(value))), [9] * 4, 2, 4))
        == [36] * 4
    )
    assert 0 < clock.phases()["decode"] < 0.1  # asleep is not at work


def test_images_without_bytes_are_missing() -> None:
    problem = framer([], fast=False)(None)
    assert getattr(problem, "reason", None) == "missing_image"


@pytest.mark.parametrize("threads", [0, 1, 4])
def test_work_ahead_keeps_order_and_its_bound(threads: int) -> None:
    taken, given = [], []
    lock = threading.Lock()

    def values() -> Iterator[int]:
        for value in range(100):
            with lock:
                taken.append(value)
            assert len(taken) - len(given) <= 7 + 1
            yield value

    for value in ahead(lambda v: v * 2, values(), threads, 7):
        given.append(value)
    assert given == [2 * v for v in range(100)]


def test_a_failure_in_a_decoding_thread_is_raised() -> None:
    with pytest.raises(ZeroDivisionError):
        list(ahead(lambda v: 1 // v, iter([1, 0, 1]), 2, 2))


def test_bf16_scores_are_close_to_float32(unit: tuple[Any, ...], weights: dict[str, Path]) -> None:
    exact = steps.evidence(stage(weights).build(MACHINE)(*unit))
    machine = MACHINE.model_copy(update={"precision": "bf16"})
    coarse = steps.evidence(stage(weights, precision="bf16").build(machine)(*unit))
    for column in ("image", "text"):
        a, b = unfixed(exact[column], np.float16)[GOOD], unfixed(coarse[column], np.float16)[GOOD]
        assert row_cosine(a, b).min() > 0.999
        assert not np.array_equal(a, b)


def test_stored_vectors_are_the_unit_rows_of_what_the_encoder_gives(
    unit: tuple[Any, ...], weights: dict[str, Path]
) -> None:
    encoder = Encoder(resolve("tiny-test-vit", str(weights["tiny-test-vit"])), FLOAT32, 1)
    table = steps.evidence(stage(weights).build(MACHINE)(*unit))
    expected = unit16(encoder.texts([SHARD[row][2] or "" for row in GOOD], MACHINE.text_batch))[0]
    assert np.array_equal(unfixed(table["text"], np.float16)[GOOD], expected)
