"""Recipes: typed, defaults written out, every mistake one message that names its key."""

import dataclasses

import pytest
import yaml

from pipeline.errors import UserError
from pipeline.recipe import RULES, Arrays, Network, load_recipe, recipe_of, resolved
from pipeline.select.cut import Cut
from pipeline.select.dedup import Dedup
from pipeline.select.density import Density

POOL = {"format": "datacomp", "path": "pool"}
MODELS = {"clip": {"arch": "ViT-B-32", "weights": "openai"}, "l14": {"image": "l14_img"}}

FULL = """
pool:
  format: webdataset
  path: ["s3://bucket/{00000..00009}.tar", "more/*.tar"]
models:
  clip: {arch: ViT-B-32, weights: laion2b_s34b_b79k}
  small: {weights: tiny}
select:
  - list: {deny: deny.parquet, on: sha256}
  - filter:
      min_words: 3
      max_aspect: 3.0
      language: {keep: [en], column: lang}
      columns: {punsafe: {max: 0.1}, nsfw: {not_in: ["NSFW", 1, true]}, x: {equals: 2.5}}
  - dedup: {space: clip, epsilon: 0.07}
  - cut: {score: clip, keep: 0.29}
  - cut: {score: "column:similarity", min: 0.28}
  - density: {space: clip.text, clusters: 100, keep: 1000, pick: easy}
  - random: {keep: 0.5, of: pool}
write: {formats: [subset], samples_per_shard: 5}
limits: {max_unreadable: 0.25}
seed: 7
embed_all: true
"""


def written(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


def mistake(plain):
    with pytest.raises(UserError) as error:
        recipe_of({"pool": POOL, **plain})
    return str(error.value)


def step(**rule):
    return {"models": MODELS, "select": [{"random": {"keep": 0.5}}, rule]}


def test_a_recipe_with_everything(tmp_path):
    recipe = load_recipe(written(tmp_path, FULL))
    assert [name for name, _ in recipe.select] == ["list", "filter", "dedup", "cut", "cut", "density", "random"]
    assert recipe.select[3][1] == Cut("clip", keep=0.29)
    assert recipe.select[5][1].keep == 1000 and recipe.select[1][1].columns["nsfw"].not_in == ["NSFW", 1, True]
    assert (recipe.seed, recipe.embed_all, recipe.limits.max_unreadable) == (7, True, 0.25)


def test_the_resolved_recipe_has_every_default_and_is_the_same_recipe(tmp_path):
    recipe = load_recipe(written(tmp_path, FULL))
    text = resolved(recipe)
    assert load_recipe(written(tmp_path, text)) == recipe
    assert resolved(load_recipe(written(tmp_path, text))) == text
    plain = yaml.safe_load(text)
    assert plain["select"][2]["dedup"] == {
        "space": "clip", "epsilon": 0.07, "clusters": "auto", "keep": "hard", "rule": "official",
        "sample_per_cluster": 10000, "iterations": 20, "passes": 0,
    }  # fmt: skip
    assert plain["select"][5]["density"] == {
        "space": "clip.text", "clusters": 100, "keep": 1000, "neighbours": 20, "temperature": 0.1, "of": "survivors",
        "pick": "easy", "floor": 1, "sample_per_cluster": 10000, "iterations": 20, "passes": 2,
    }  # fmt: skip


def test_defaults_of_the_shortest_recipe():
    recipe = recipe_of({"pool": POOL})
    assert yaml.safe_load(resolved(recipe)) == {
        "pool": POOL,
        "models": {},
        "select": [],
        "write": {"samples_per_shard": 10000, "annotate": False, "images": False},
        "limits": {"max_unreadable": 0.01},
        "seed": 0,
        "embed_all": False,
    }
    assert recipe_of({"pool": POOL, "models": None, "select": None, "write": None, "limits": None}) == recipe


def test_models_are_networks_or_arrays():
    recipe = recipe_of({"pool": POOL, "models": {**MODELS, "both": {"image": "a", "text": "b"}}})
    assert recipe.models["clip"] == Network("openai", "ViT-B-32")
    assert recipe.models["both"] == Arrays("a", "b")
    assert [m.sides for m in recipe.models.values()] == [("image", "text"), ("image",), ("image", "text")]


@pytest.mark.parametrize(
    ("plain", "message"),
    [
        ({"selct": []}, "recipe.selct: unknown key; did you mean 'select'?"),
        ({"qqq": 1}, "recipe.qqq: unknown key; known: embed_all, limits, models, pool, seed, select, write"),
        ({"pool": {"format": "tar", "path": "x"}}, "recipe.pool.format: Input should be 'webdataset', 'datacomp'"),
        ({"pool": {"format": "parquet"}}, "recipe.pool.path: required, but missing"),
        ({"pool": {**POOL, "paht": 1}}, "recipe.pool.paht: unknown key; did you mean 'path'?"),
        ({"pool": None}, "recipe.pool.format: required, but missing"),
        ({"pool": "x"}, "recipe.pool: expected keys and values, got str"),
        ({"models": ["clip"]}, "recipe.models: expected keys and values, got list"),
        ({"models": {"clip": "tiny"}}, "recipe.models.clip: expected keys and values, got str"),
        ({"models": {"clip": {"arch": "ViT-B-32"}}}, "recipe.models.clip: a model needs `weights`: tiny, a pretrained"),
        ({"models": {"clip": None}}, "recipe.models.clip.weights: required, but missing"),
        ({"models": {"clip": {"weigths": "x"}}}, "recipe.models.clip.weigths: unknown key; did you mean 'weights'?"),
        ({"models": {"clip": {"image": "a", "txt": "b"}}}, "recipe.models.clip.txt: unknown key; did you mean 'text'?"),
        ({"models": {"a.b": {"weights": "tiny"}}}, "recipe.models.a.b: a model's name is letters, digits, _ and -"),
        ({"models": {"column:x": {"weights": "tiny"}}}, "recipe.models.column:x: a model's name is letters"),
        (
            {"pool": {"format": "webdataset", "path": "x"}, "models": {"l14": {"image": "a"}}},
            "recipe.models.l14: a webdataset pool has no precomputed arrays",
        ),
        (
            {"pool": {"format": "clip_retrieval", "path": "x"}, "models": {"c": {"weights": "tiny"}}},
            "recipe.models.c: a clip_retrieval pool has no images to embed; name its arrays",
        ),
        ({"select": {}}, "recipe.select: expected a list of steps, got dict"),
        ({"select": ["random"]}, "recipe.select.0: a step is one rule and its keys, such as `- cut: {score: clip"),
        ({"select": [{"random": {"keep": 0.5}, "cut": {}}]}, "recipe.select.0: a step is one rule and its keys"),
        ({"select": [{"desity": {}}]}, "recipe.select.0.desity: no such rule; did you mean 'density'?"),
        (step(random=None), "recipe.select.1.random.keep: required, but missing"),
        (step(random={"keep": 1.5}), "recipe.select.1.random.keep: keep is a fraction in (0, 1] or a whole number of"),
        (step(random={"keep": 0}), "recipe.select.1.random.keep: keep is a fraction in (0, 1] or a whole number of"),
        (step(random={"keep": 1}), "recipe.select.1.random.keep: keep is a fraction in (0, 1] or a whole number of"),
        (step(random={"keep": "half"}), "recipe.select.1.random.keep: Input should be a valid number, got 'half'"),
        (step(random={"keep": True}), "recipe.select.1.random.keep: Input should be a valid number, got True"),
        (step(random={"keep": 0.5, "of": "all"}), "recipe.select.1.random.of: Input should be 'survivors' or 'pool'"),
        (step(random={"keep": 0.5, "off": 1}), "recipe.select.1.random.off: unknown key; did you mean 'of'?"),
        (step(cut={"score": "clip"}), "recipe.select.1.cut: cut needs one of keep and min"),
        (step(cut={"score": "clip", "keep": 0.5, "min": 0.1}), "recipe.select.1.cut: cut needs one of keep and min"),
        (step(cut={"score": "clip", "min": float("nan")}), "recipe.select.1.cut.min: "),
        (step(cut={"score": "clip", "min": float("inf")}), "recipe.select.1.cut.min: "),
        (step(cut={"score": "column:", "min": 0}), "recipe.select.1.cut.score: which column? (`column:NAME`)"),
        (
            step(cut={"score": "clp", "min": 0}),
            "recipe.select.1.cut.score: no model 'clp'; did you mean 'clip'? (a col",
        ),
        (
            step(cut={"score": "l14", "min": 0}),
            "recipe.select.1.cut.score: model 'l14' has no text vectors, so no score",
        ),
        (step(dedup={"space": "clip"}), "recipe.select.1.dedup.epsilon: required, but missing"),
        (step(dedup={"space": "clip", "epsilon": 3}), "recipe.select.1.dedup.epsilon: Input should be less than or eq"),
        (
            step(dedup={"space": "cli", "epsilon": 0}),
            "recipe.select.1.dedup.space: no model 'cli'; did you mean 'clip'",
        ),
        (step(dedup={"space": "l14.text", "epsilon": 0}), "recipe.select.1.dedup.space: model 'l14' has no 'text' vec"),
        (step(dedup={"space": "clip.image", "epsilon": 0}), "recipe.select.1.dedup.space: model 'clip' has no 'image'"),
        (
            step(dedup={"space": "clip", "epsilon": 0, "clusters": 0}),
            "recipe.select.1.dedup.clusters: Input should be ",
        ),
        (step(density={"space": "clip", "keep": 0.5}), "recipe.select.1.density.clusters: required, but missing"),
        (step(density={"space": "clip", "clusters": 4}), "recipe.select.1.density.keep: required, but missing"),
        (
            step(density={"space": "clip", "clusters": 4, "keep": 0.5, "temperature": 0}),
            "recipe.select.1.density.temperature: Input should be greater than 0, got 0",
        ),
        (
            step(density={"space": "clip", "clusters": 4, "keep": 0.5, "sample_per_cluster": 1_000_001}),
            "recipe.select.1.density.sample_per_cluster: Input should be less than or equal to 1000000, got 1000001",
        ),
        (
            step(dedup={"space": "clip", "epsilon": 0, "sample_per_cluster": 1_000_001}),
            "recipe.select.1.dedup.sample_per_cluster: Input should be less than or equal to 1000000, got 1000001",
        ),
        (
            step(cut={"score": "column:value", "keep": 0.5}),
            "recipe.select.1.cut.score: the decisions have a column 'value' of their own",
        ),
        (
            step(cut={"score": "column:score_clip", "keep": 0.5}),
            "recipe.select.1.cut.score: the decisions have a column 'score_clip' of their own",
        ),
        (step(filter={}), "recipe.select.1.filter: filter needs at least one bound"),
        (
            step(filter={"columns": {"x": {}}}),
            "recipe.select.1.filter.columns.x: give at least one of min, max, equals",
        ),
        (step(filter={"columns": {"x": {"mim": 1}}}), "recipe.select.1.filter.columns.x.mim: unknown key"),
        (step(filter={"min_words": 2.5}), "recipe.select.1.filter.min_words: Input should be a valid integer, got 2.5"),
        (step(filter={"language": {"column": "lang"}}), "recipe.select.1.filter.language.keep: required, but missing"),
        (step(list={"on": "uid"}), "recipe.select.1.list: list needs one of deny and allow"),
        (step(list={"deny": "x", "on": "name"}), "recipe.select.1.list.on: Input should be 'uid', 'url', 'sha256' or"),
        (
            {"write": {"formats": ["tar"]}},
            "recipe.write.formats.0: Input should be 'webdataset', 'parquet' or 'subset'",
        ),
        ({"write": {"samples_per_shard": 0}}, "recipe.write.samples_per_shard: Input should be greater than or equal"),
        ({"limits": {"max_unreadable": 1.5}}, "recipe.limits.max_unreadable: Input should be less than or equal to 1"),
        ({"limits": {"max_unreadable": float("nan")}}, "recipe.limits.max_unreadable: "),
        ({"seed": "zero"}, "recipe.seed: Input should be a valid integer, got 'zero'"),
        ({"embed_all": 1}, "recipe.embed_all: Input should be a valid boolean, got 1"),
    ],
)
def test_a_mistake_is_one_message_that_names_the_key(plain, message):
    said = mistake(plain)
    assert said.startswith(message)
    assert "\n" not in said


def test_only_true_and_false_are_booleans(tmp_path):
    text = "pool: {format: parquet, path: x}\nselect:\n  - filter: {language: {keep: [no, truelike, en], column: on}}\n"
    [(_, rule)] = load_recipe(written(tmp_path, f"{text}embed_all: True\n")).select
    assert (rule.language.keep, rule.language.column) == (["no", "truelike", "en"], "on")
    assert load_recipe(written(tmp_path, resolved(load_recipe(written(tmp_path, text))))).select[0][1] == rule
    with pytest.raises(UserError, match=r"recipe\.embed_all: Input should be a valid boolean, got 'yes'"):
        load_recipe(written(tmp_path, f"{text}embed_all: yes\n"))


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "+1e-3", "1.e-3", "0.1e-2", ".001", "10.0e-4"])
def test_a_number_with_an_exponent_is_a_number(tmp_path, text):
    recipe = load_recipe(written(tmp_path, FULL.replace("epsilon: 0.07", f"epsilon: {text}")))
    assert recipe.select[2][1].epsilon == 0.001
    changed = load_recipe(written(tmp_path, FULL), [f"select.2.dedup.epsilon={text}"])
    assert changed.select[2][1].epsilon == 0.001


@pytest.mark.parametrize("text", ["1e-3", "1E5", ".1e5", "1e", "e5", "1e5x", "on", "1.5"])
def test_text_that_looks_like_a_number_stays_text_in_the_resolved_recipe(tmp_path, text):
    recipe = load_recipe(written(tmp_path, FULL.replace("{equals: 2.5}", f"{{equals: '{text}'}}")))
    again = load_recipe(written(tmp_path, resolved(recipe)))
    assert again.select[1][1].columns["x"].equals == text
    assert again == recipe


def test_a_recipe_needs_a_pool():
    with pytest.raises(UserError, match=r"^recipe.pool: required, but missing$"):
        recipe_of({"select": []})


def test_keep_keeps_its_kind(tmp_path):
    text = "pool: {format: parquet, path: x}\nselect:\n  - random: {keep: %s}\n"
    for written_as, expected in [("1.0", 1.0), ("2", 2), ("0.1", 0.1), ("1.0e-3", 0.001)]:
        [(_, rule)] = load_recipe(written(tmp_path, text % written_as)).select
        assert (rule.keep, type(rule.keep)) == (expected, type(expected))


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("select.2.dedup.epsilon=0.03", lambda r: r.select[2][1].epsilon == 0.03),
        ("select.2.dedup.clusters=9", lambda r: r.select[2][1].clusters == 9),
        ("select.1.filter.columns.punsafe.max=0.5", lambda r: r.select[1][1].columns["punsafe"].max == 0.5),
        ("pool.path.1=other", lambda r: r.pool.path[1] == "other"),
        ("seed=3", lambda r: r.seed == 3),
        ("write.annotate=true", lambda r: r.write.annotate is True),
        ("write.formats=[subset, parquet]", lambda r: r.write.formats == ["subset", "parquet"]),
        ("models.more.weights=tiny", lambda r: r.models["more"] == Network("tiny")),
        ("select=[]", lambda r: r.select == []),
        ("pool.path=a=b", lambda r: r.pool.path == "a=b"),
    ],
)
def test_overrides_reach_into_mappings_and_lists(tmp_path, override, value):
    assert value(load_recipe(written(tmp_path, FULL), [override]))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "--set seed: expected KEY=VALUE"),
        ("select.9.dedup.epsilon=1", "--set select.9.dedup.epsilon: '9' is not an index of a list of 7"),
        ("select.7.random.keep=1", "--set select.7.random.keep: '7' is not an index of a list of 7"),
        ("select.x.dedup=1", "--set select.x.dedup: 'x' is not an index of a list of 7"),
        ("select.²=1", "--set select.²: '²' is not an index of a list of 7"),
        ("select.-1.random.keep=1", "--set select.-1.random.keep: '-1' is not an index of a list of 7"),
        ("seed.x=1", "--set seed.x: 'x' is not inside a mapping or list"),
        ("seed={", "--set seed: not valid YAML"),
        ("select.2.dedup.epsilom=3", "recipe.select.2.dedup.epsilom: unknown key; did you mean 'epsilon'?"),
        ("selct.0=1", "recipe.selct: unknown key; did you mean 'select'?"),
    ],
)
def test_a_wrong_override_is_named(tmp_path, override, message):
    with pytest.raises(UserError) as error:
        load_recipe(written(tmp_path, FULL), [override])
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n", "a recipe is a mapping with `pool`, `select`, ..."),
        ("", "a recipe is a mapping"),
        ("pool: [", "not valid YAML"),
        ("pool: {format: parquet, path: a}\nselect:\n- cut: {score: a, min: 1, min: 2}\n", "key 'min' is given twice"),
        ("models: {1: {weights: tiny}, 1.0: {weights: tiny}}\n", "key '1' is given twice"),
        ("seed: 1\npool: {format: parquet, path: a}\nseed: 2\n", "key 'seed' is given twice"),
        ("pool: &a {format: parquet}\nmodels: *a\n", "anchors and aliases"),
        ("pool: !!python/object/apply:os.system [id]\n", "not valid YAML"),
    ],
)
def test_a_file_that_is_no_recipe(tmp_path, text, message):
    with pytest.raises(UserError) as error:
        load_recipe(written(tmp_path, text))
    assert str(error.value).startswith(f"{tmp_path}/recipe.yaml: ") and message in str(error.value)


def test_a_recipe_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"none\.yaml: cannot be read: No such file"):
        load_recipe(tmp_path / "none.yaml")


def test_every_rule_is_frozen_and_known_by_its_file():
    for name, rule in RULES.items():
        assert rule.__module__ == f"pipeline.select.{name}"
        assert dataclasses.fields(rule)
    with pytest.raises(dataclasses.FrozenInstanceError):
        Dedup("clip", 0.1).epsilon = 0.2
    assert Density("clip", 4, 0.5).passes == 2
