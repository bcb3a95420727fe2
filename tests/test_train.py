from __future__ import annotations

import io
import json
import math
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from jobs import train_filter
from pipeline import tiny
from pipeline.errors import UserError
from pipeline.machine import Machine
from pipeline.train import (
    Data,
    Model,
    Teacher,
    TrainRecipe,
    contrastive_loss,
    distillation_loss,
    learning_rate,
    list_pairs,
    load_train_recipe,
    train,
)
from tests import models

MACHINE = Machine(device="cpu", precision="float32")
DIMS = 24
COLOURS = ["red", "green", "blue", "black", "white", "grey", "pink", "brown"]
SHAPES = ["bar", "box", "beam"]


def picture(row: int) -> bytes:
    """Blocks in the caption's colour, random in brightness, so that no two rows are near-copies."""
    colour = [row % 8 >> channel & 1 for channel in range(3)]
    blocks = np.random.default_rng(row).integers(0, 90, (6, 6, 3)).astype(np.uint8) + np.uint8(160) * np.uint8(colour)
    file = io.BytesIO()
    Image.fromarray(blocks).resize((40, 40), Image.Resampling.NEAREST).save(file, "PNG")
    return file.getvalue()


def write_shard(path: Path, rows: range, images: dict[int, bytes] | None = None) -> None:
    with tarfile.open(path, "w") as tar:
        for row in rows:
            caption = f"{COLOURS[row % 8]} {SHAPES[row // 8 % 3]}"
            fields = {
                "source": ["drawn", "painted", "secret"][row % 3],
                "license": ["CC0", "MIT", "none"][row % 3],
                "keywords": json.dumps([COLOURS[row % 8], "shape"]),
                "alt": "[no list" if row == 0 else None,
            }
            members = {"png": (images or {}).get(row, picture(row)), "txt": caption.encode()}
            members["json"] = json.dumps(fields).encode()
            for suffix, data in members.items():
                info = tarfile.TarInfo(f"{row:09}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


@pytest.fixture(scope="module")
def arch(tmp_path_factory: pytest.TempPathFactory) -> Model:
    weights = models.make(tmp_path_factory.mktemp("arch"), "tiny-test-vit")
    return Model(arch="tiny-test-vit", weights=str(weights))


@pytest.fixture
def pool(tmp_path: Path) -> str:
    write_shard(tmp_path / "00000.tar", range(12))
    write_shard(tmp_path / "00001.tar", range(12, 24))
    return str(tmp_path / "*.tar")


def recipe_of(pool: str, model: Model, **changes: Any) -> TrainRecipe:
    data = Data(path=pool, captions=("keywords",), held_out=0.0)
    return TrainRecipe(**{"data": data, "model": model, "batch": 8, "epochs": 2, **changes})


def write_vectors(path: Path, name: str, vector_of: dict[str, Any]) -> str:
    pq.write_table(pa.table({name: list(vector_of), "vector": [list(map(float, v)) for v in vector_of.values()]}), path)
    return str(path)


def test_contrastive_loss_by_hand() -> None:
    image_BD = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    text_BD = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    # Cosines: [[1, 0.6], [0, 0.8]]; times 2: [[2, 1.2], [0, 1.6]].
    rows = [math.log(math.exp(2) + math.exp(1.2)) - 2, math.log(1 + math.exp(1.6)) - 1.6]
    columns = [math.log(math.exp(2) + 1) - 2, math.log(math.exp(1.2) + math.exp(1.6)) - 1.6]
    none_BB = torch.zeros(2, 2, dtype=torch.bool)
    expected = (sum(rows) / 2 + sum(columns) / 2) / 2
    assert contrastive_loss(image_BD, text_BD, 2.0, none_BB).item() == pytest.approx(expected, abs=1e-6)


def test_pairs_with_one_caption_are_no_mismatch_of_each_other() -> None:
    unit_BD = torch.nn.functional.normalize(torch.randn(3, 4, generator=torch.Generator().manual_seed(0)), dim=1)
    same_BB = torch.tensor([[True, True, False], [True, True, False], [False, False, True]])
    cos = (unit_BD @ unit_BD.T * 5).tolist()
    allowed = [[0, 2], [1, 2], [0, 1, 2]]
    expected = sum(math.log(sum(math.exp(cos[i][j]) for j in allowed[i])) - cos[i][i] for i in range(3)) / 3
    assert contrastive_loss(unit_BD, unit_BD, 5.0, same_BB).item() == pytest.approx(expected, abs=1e-5)


def test_distillation_loss_by_hand() -> None:
    student_BD = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    teacher_BD = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, -1.0]])
    assert distillation_loss(student_BD, teacher_BD).item() == pytest.approx((0 + 0.4 + 2) / 3)


def test_the_learning_rate_rises_and_falls_along_a_cosine() -> None:
    rates = [learning_rate(step, 10, 0.2, 1.0) for step in range(10)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[6] == pytest.approx(0.5)
    assert rates[2:] == sorted(rates[2:], reverse=True) and 0 < rates[9] < 0.05


def test_pairs_carry_caption_variants_source_and_licence(pool: str) -> None:
    pairs = list_pairs(Data(path=pool, captions=("keywords", "alt"), skip_sources=("secret",)), MACHINE)
    assert len(pairs.rows) == 16 and {pair.source for pair in pairs.rows} == {"drawn", "painted"}
    first = pairs.rows[0]
    assert (first.key, first.caption, first.variants, first.license) == (
        "000000000",
        "red bar",
        ("red, shape", "[no list"),
        "CC0",
    )
    image = pairs.image(pairs.rows[-1])
    assert isinstance(image, Image.Image)
    last = Image.open(io.BytesIO(picture(int(pairs.rows[-1].key))))
    assert np.array_equal(np.asarray(image), np.asarray(last))


@pytest.mark.filterwarnings("ignore:Importing from timm:FutureWarning")  # open_clip's lock of a timm tower
def test_the_first_step_of_a_locked_network_sees_what_open_clip_gives(pool: str, tmp_path: Path) -> None:
    model = Model(arch=tiny.ARCH, config=str(tiny.CONFIG), weights=str(tiny.WEIGHTS), bpe=str(tiny.BPE))
    model = model.model_copy(update={"unlocked_groups": 0})
    data = Data(path=pool, held_out=0.0)
    losses: list[float] = []
    recipe = TrainRecipe(data=data, model=model, batch=24, epochs=1, min_crop=1.0)
    train(recipe, tmp_path / "out", MACHINE, lambda done, steps, loss: losses.append(loss))

    network, _, transform = open_clip.create_model_and_transforms(tiny.ARCH, pretrained=str(tiny.WEIGHTS))
    pairs = list_pairs(data, MACHINE).rows
    pictures = [Image.open(io.BytesIO(picture(int(pair.key)))) for pair in pairs]
    captions = np.array([pair.caption for pair in pairs])
    with torch.no_grad():
        image_ND = network.eval().encode_image(torch.stack([transform(one) for one in pictures]), normalize=True)
        tokens = open_clip.get_tokenizer(tiny.ARCH, bpe_path=str(tiny.BPE))(captions.tolist())
        text_ND = network.encode_text(tokens, normalize=True)
        same_NN = torch.from_numpy(captions[:, None] == captions[None, :])
        expected = contrastive_loss(image_ND, text_ND, network.logit_scale.exp(), same_NN)
    assert losses == [pytest.approx(expected.item(), rel=1e-4)]


def test_a_stopped_training_goes_on_to_the_same_weights(pool: str, arch: Model, tmp_path: Path) -> None:
    recipe = recipe_of(pool, arch)
    whole = train(recipe, tmp_path / "whole", MACHINE)

    def stop_in_the_second_epoch(done: int, steps: int, loss: float) -> None:
        assert steps == 6
        if done == 4:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        train(recipe, tmp_path / "parts", MACHINE, stop_in_the_second_epoch)
    seen: list[int] = []
    parts = train(recipe, tmp_path / "parts", MACHINE, lambda done, steps, loss: seen.append(done))
    assert seen == [4, 5, 6]
    assert whole.weights.read_bytes() == parts.weights.read_bytes()
    assert whole.weights.read_bytes() != Path(str(arch.weights)).read_bytes()


def test_the_number_of_decoders_changes_nothing_and_the_seed_does(pool: str, arch: Model, tmp_path: Path) -> None:
    recipe = recipe_of(pool, arch, epochs=1)
    one = train(recipe, tmp_path / "one", MACHINE)
    three = train(recipe, tmp_path / "three", MACHINE.model_copy(update={"decoders": 3}))
    other = train(recipe.model_copy(update={"seed": 1}), tmp_path / "other", MACHINE)
    assert one.weights.read_bytes() == three.weights.read_bytes() != other.weights.read_bytes()


def test_training_tells_matched_pairs_from_mismatched(pool: str, arch: Model, tmp_path: Path) -> None:
    losses: list[float] = []
    recipe = recipe_of(pool, arch, epochs=10, learning_rate=3e-3)
    train(recipe, tmp_path / "out", MACHINE, lambda done, steps, loss: losses.append(loss))
    assert np.mean(losses[-3:]) < 0.8 * np.mean(losses[:3])


def test_open_clip_loads_what_was_trained_also_from_float16(pool: str, arch: Model, tmp_path: Path) -> None:
    full = train(recipe_of(pool, arch, epochs=1), tmp_path / "full", MACHINE)
    half = train(recipe_of(pool, arch, epochs=1, save_as="float16"), tmp_path / "half", MACHINE)
    states = [
        open_clip.create_model(arch.arch, pretrained=str(trained.weights)).state_dict() for trained in (full, half)
    ]
    for name, tensor in states[0].items():
        assert torch.allclose(tensor, states[1][name], rtol=1e-3, atol=1e-3)
    stored = load_file(half.weights)
    assert {tensor.dtype for tensor in stored.values() if tensor.ndim >= 2} == {torch.float16}
    assert stored["logit_scale"].dtype == torch.float32


def test_locked_layers_stay_as_they_were(pool: str, arch: Model, tmp_path: Path) -> None:
    locked = arch.model_copy(update={"unlocked_groups": 0})
    after = load_file(train(recipe_of(pool, locked), tmp_path / "out", MACHINE).weights)
    before = load_file(str(arch.weights))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and not any(name.startswith("visual.") for name in changed)


def test_a_teachers_vectors_are_imitated(pool: str, arch: Model, tmp_path: Path) -> None:
    pairs = list_pairs(Data(path=pool, captions=("keywords",)), MACHINE).rows
    image = write_vectors(tmp_path / "images.parquet", "key", {pair.key: np.eye(DIMS)[0] for pair in pairs})
    texts = {text: np.eye(DIMS)[0] for pair in pairs for text in (pair.caption, *pair.variants)}
    teacher = Teacher(images=image, texts=write_vectors(tmp_path / "texts.parquet", "text", texts), weight=100.0)
    recipe = recipe_of(pool, arch, epochs=10, learning_rate=3e-3, teacher=teacher)
    trained = train(recipe, tmp_path / "out", MACHINE)
    network = open_clip.create_model(arch.arch, pretrained=str(trained.weights)).eval()
    with torch.no_grad():
        tokens = open_clip.get_tokenizer(arch.arch)(sorted(texts))
        text_ND = network.encode_text(tokens, normalize=True)
        image_ND = network.encode_image(torch.randn(2, 3, 32, 32), normalize=True)
    assert text_ND[:, 0].min() > 0.9 and image_ND[:, 0].min() > 0.7


def test_a_teacher_may_be_an_open_clip_model(pool: str, arch: Model, tmp_path: Path) -> None:
    with_itself = Teacher(arch=arch.arch, weights=arch.weights)
    losses: list[float] = []
    bare: list[float] = []
    recipe = recipe_of(pool, arch, epochs=1)
    train(recipe, tmp_path / "bare", MACHINE, lambda done, steps, loss: bare.append(loss))
    taught = recipe.model_copy(update={"teacher": with_itself})
    train(taught, tmp_path / "taught", MACHINE, lambda done, steps, loss: losses.append(loss))
    assert losses[0] == pytest.approx(bare[0], abs=1e-5), "a model agrees with itself before the first step"
    assert losses[1] > bare[1]


def test_the_card_names_sources_licences_and_held_out_figures(pool: str, arch: Model, tmp_path: Path) -> None:
    write_shard(tmp_path / "00002.tar", range(24, 27), {24: b"not an image", 25: picture(0)})
    data = Data(path=pool, skip_sources=("secret",), held_out=0.3)
    trained = train(recipe_of(pool, arch, data=data, batch=4, epochs=1), tmp_path / "out", MACHINE)
    card = trained.card.read_text()
    counts = {
        line.rsplit("|", 2)[0]: int(line.split("|")[3]) for line in card.splitlines() if "CC0" in line or "MIT" in line
    }
    assert set(counts) == {"| drawn | CC0 ", "| painted | MIT "}
    assert trained.figures is not None and trained.figures.pairs + sum(counts.values()) == 17
    assert "secret" in card.split("Sources left out")[1].splitlines()[0]
    assert "unreadable image: 1." in card
    assert 0 < trained.figures.pairs <= 0.3 * 17
    assert f"| {trained.figures.auc_inside:.3f} | 0.500 |" in card
    assert f"recall@5, image to text among {trained.figures.recall_pool} |" in card


def test_the_command_trains_and_prints_the_card(
    pool: str, arch: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    model = f"{{arch: {arch.arch}, weights: {arch.weights}}}"
    recipe.write_text(f"data: {{path: '{pool}', held_out: 0}}\nmodel: {model}\nbatch: 12\nepochs: 1\n")
    assert train_filter.main([str(recipe), "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr()
    assert "| drawn | CC0 | 8 |" in shown.out and "model.safetensors" in shown.out
    assert "step 2 of 2" in shown.err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data: {path: x}\nmodel: {arch: y}\nbach: 3\n", r"recipe\.bach: unknown key; did you mean 'batch'\?"),
        ("data: {path: x, helt_out: 0}\nmodel: {arch: y}\n", r"recipe\.data\.helt_out: unknown key"),
        ("model: {arch: y}\n", r"recipe\.data: required, but missing"),
        ("data: {path: x}\nmodel: {arch: y}\nepochs: 0\n", r"recipe\.epochs: .*got 0"),
    ],
)
def test_a_wrong_recipe_is_refused_by_its_key(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        load_train_recipe(tmp_path / "recipe.yaml")
    assert train_filter.main([str(tmp_path / "recipe.yaml")]) == 2


def test_a_pool_without_pairs_is_refused(arch: Model, tmp_path: Path) -> None:
    write_shard(tmp_path / "00000.tar", range(2, 3))
    recipe = recipe_of(str(tmp_path / "*.tar"), arch, data=Data(path=str(tmp_path), skip_sources=("secret",)))
    with pytest.raises(UserError, match=r"recipe\.data\.path: no image-text pair in"):
        train(recipe, tmp_path / "out", MACHINE)


def test_a_batch_larger_than_the_pool_is_refused(pool: str, arch: Model, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"recipe\.batch: 25 is more than the 24 pairs"):
        train(recipe_of(pool, arch, batch=25), tmp_path / "out", MACHINE)


def test_an_unknown_model_is_refused(pool: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"recipe\.model: no-such-arch"):
        train(recipe_of(pool, Model(arch="no-such-arch")), tmp_path / "out", MACHINE)
    with pytest.raises(UserError, match=r"recipe\.model\.config: no such file: nowhere\.json"):
        train(recipe_of(pool, Model(arch="nowhere", config="nowhere.json")), tmp_path / "out", MACHINE)


def test_a_checkpoint_of_another_recipe_is_refused(pool: str, arch: Model, tmp_path: Path) -> None:
    train(recipe_of(pool, arch, epochs=1), tmp_path / "out", MACHINE)
    with pytest.raises(UserError, match=r"checkpoint\.pt: from another recipe"):
        train(recipe_of(pool, arch, epochs=2), tmp_path / "out", MACHINE)


def test_fp16_gradients_are_refused(pool: str, arch: Model, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"machine\.precision: fp16"):
        train(recipe_of(pool, arch), tmp_path / "out", MACHINE.model_copy(update={"precision": "fp16"}))


def test_a_teacher_that_cannot_teach_is_refused(pool: str, arch: Model, tmp_path: Path) -> None:
    images = write_vectors(tmp_path / "images.parquet", "key", {"000000000": np.eye(DIMS)[0]})
    texts = write_vectors(tmp_path / "texts.parquet", "text", {"red bar": np.eye(DIMS)[0]})
    narrow = write_vectors(tmp_path / "narrow.parquet", "text", {"red bar": np.eye(3)[0]})
    for teacher, message in [
        (Teacher(), "needs images and texts, or arch"),
        (Teacher(images=images, texts=texts), r"images\.parquet has no vector of '0000"),
        (Teacher(images=images, texts=narrow), "its vectors have 3 numbers, the model's 24"),
        (Teacher(images=images, texts=str(tmp_path / "none.parquet")), r"none\.parquet: cannot be read"),
    ]:
        with pytest.raises(UserError, match=message):
            train(recipe_of(pool, arch, teacher=teacher), tmp_path / "out", MACHINE)


def test_the_shipped_recipes_are_valid() -> None:
    folder = Path(__file__).parent.parent / "conf" / "recipes"
    assert load_train_recipe(folder / "train_tiny.yaml").model.arch == "pairsieve-tiny"
    assert load_train_recipe(folder / "train_dfn.yaml").teacher is None
