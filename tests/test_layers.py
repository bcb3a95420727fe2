"""Who may import whom, and what nobody may do: read from the source of every module, not from what happens to run."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for folder in ("pipeline", "jobs")
    for path in sorted((ROOT / folder).rglob("*.py"))
}

VALUES = {"schema", "errors", "vectors", "products", "machine", "config", "arrow", "stage", "costs"}
STORAGE = {"storage", "executor", "ray_executor", "parts", "lease"}
RUN = {"run"}
KERNELS = {"exact", "kmeans", "images", "formats.tar"}
TOP = {
    "curate", "plan", "probe", "recipe", "record", "verify", "explain", "gc", "status", "doctor", "sample", "train",
    "report", "tally", "control", "pictures", "planted", "charts",
}  # fmt: skip
"""All other modules are stages."""

UNPICKLERS = {"pickle", "cloudpickle", "joblib", "marshal", "shelve", "dill"}


def tree(module):
    return ast.parse(MODULES[module].read_text())


def layer(module):
    """Position of a module: values, storage and executor, run, kernels and stages, curate and recipe, jobs."""
    if module.startswith("jobs"):
        return 5
    name = module.removeprefix("pipeline.")
    layers = [VALUES, STORAGE, RUN, KERNELS, TOP]
    return next((at for at, names in enumerate(layers) if name in names), 3)


def imports(module):
    """(module, name) of every import, wherever it stands; the name is None for a whole module."""
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: a relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield (inner, None) if inner in MODULES else (node.module, alias.name)


def ours(module):
    return [name for name, _ in imports(module) if name in MODULES and name not in ("pipeline", "jobs")]


def calls(module):
    """(dotted name, keywords by name) of every call."""
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}


def test_the_names_of_the_layers_are_those_of_modules():
    assert {f"pipeline.{name}" for name in VALUES | STORAGE | RUN | KERNELS | TOP} <= set(MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_from_its_own_layer_or_from_below(module):
    above = [other for other in ours(module) if layer(other) > layer(module)]
    assert not above, f"{module} imports {above}"


@pytest.mark.parametrize("module", sorted(KERNELS))
def test_kernels_import_values_only(module):
    kernel = f"pipeline.{module}"
    assert {layer(other) for other in ours(kernel)} <= {0}
    foreign = {name.partition(".")[0] for name, _ in imports(kernel)} & {"torch", "ray", "fsspec", "pyarrow", "polars"}
    assert not foreign


@pytest.mark.parametrize("module", sorted(VALUES))
def test_values_import_torch_at_most_when_a_large_product_needs_it(module):
    """It takes a second or two and 200 MB, which no driver, kernel or small input should pay."""
    everywhere = [name for name, _ in imports(f"pipeline.{module}") if name.partition(".")[0] == "torch"]
    guarded = ("FunctionDef", "If")  # the other is `if TYPE_CHECKING`
    inside = [
        inner
        for node in tree(f"pipeline.{module}").body
        if type(node).__name__ in guarded
        for inner in ast.walk(node)
        if isinstance(inner, ast.Import) and inner.names[0].name == "torch"
    ]
    assert len(everywhere) == len(inside)
    assert not everywhere or module == "products"


def test_only_the_ray_executor_imports_ray():
    users = {module for module in MODULES for name, _ in imports(module) if name.partition(".")[0] == "ray"}
    assert users == {"pipeline.ray_executor"}


@pytest.mark.parametrize("module", MODULES)
def test_nothing_is_read_that_can_run_code(module):
    for name, item in imports(module):
        assert name.partition(".")[0] not in UNPICKLERS or item == "UnpicklingError", f"{module} imports {name}"
    for name, words in calls(module):
        last = name.rpartition(".")[2]
        assert name not in ("eval", "exec", "compile", "__import__"), f"{module} calls {name}"
        assert not (name.startswith("yaml.") and last in ("load", "load_all", "unsafe_load", "full_load")), module
        assert name not in ("os.system", "os.popen"), f"{module} calls {name}"
        assert words.get("shell", "False") == "False", f"{module} calls {name} with a shell"
        assert words.get("allow_pickle", "False") == "False", f"{module} calls {name} with pickles"
        if name in ("np.load", "numpy.load", "np.lib.format.read_array"):
            assert words.get("allow_pickle") == "False", f"{module}: {name} without allow_pickle=False"
        if name == "torch.load":
            assert words.get("weights_only") == "True", f"{module}: torch.load without weights_only=True"


@pytest.mark.parametrize("module", MODULES)
def test_no_error_is_swallowed_without_its_name_but_where_errors_become_values(module):
    swallowed = [
        ast.unparse(node.type) if node.type else "everything"
        for node in ast.walk(tree(module))
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or ast.unparse(node.type) in ("Exception", "BaseException"))
        and not any(isinstance(inner, ast.Raise) for inner in ast.walk(node))
    ]
    assert swallowed == (["Exception"] if module == "pipeline.executor" else [])
