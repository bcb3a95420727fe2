"""Hostile input and secrets: what the checklist of defences (S1 to S17) forbids does not happen.

Tests of single defences stand beside their modules: images (S7), tar names (S1), metadata (S6, S8), storage (S13),
reports (S10), weights (S4), the deployment files and the job submission (S11, S12), doctor (S16).
"""

from __future__ import annotations

import ast
import functools
import http.server
import io
import json
import os
import random
import re
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from jobs import cli
from pipeline.config import MAX_YAML_BYTES, load_yaml, parse_yaml
from pipeline.curate import curate
from pipeline.errors import UserError
from pipeline.executor import Serial
from pipeline.formats.tar import END, member_header, padding
from pipeline.formats.webdataset import _safe, unsafe
from pipeline.machine import Machine, load_machine
from pipeline.recipe import recipe_of, resolved
from pipeline.run import Run
from pipeline.select.list import List
from pipeline.storage import Root, redacted, without_secrets
from tests import corpus_tables
from tests.corpus import Shard
from tests.corpus_samples import JPEG
from tests.corpus_tables import Canary
from tests.pools import webdataset_pool
from tests.runs import webdataset

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*ROOT.glob("pipeline/**/*.py"), *ROOT.glob("jobs/*.py")])

FORBIDDEN_MODULES = {"pickle", "cloudpickle", "joblib", "dill", "shelve", "marshal", "webdataset", "ray.data"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "yaml.load", "yaml.full_load", "yaml.unsafe_load"}
FORBIDDEN_CALLS |= {"os.system", "os.popen", "pd.read_pickle", "faiss.read_index", "tarfile.open", "Image.open"}
EXPLICIT = {"np.load": ("allow_pickle", False), "torch.load": ("weights_only", True)}
EXPLICIT |= {"np.lib.format.read_array": ("allow_pickle", False)}


def faults(tree: ast.AST, path: Path = ROOT) -> list[str]:
    """What a source file must not do, by line."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            wanted = {alias.name for alias in node.names}
            names = [] if wanted == {"UnpicklingError"} else names
            found += [f"{node.lineno}: {name}" for name in names if FORBIDDEN_MODULES & {name, name.partition(".")[0]}]
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        given = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
        own = path.name == "sample.py" and name in ("Image.open", "tarfile.open")  # what it made itself
        if (name in FORBIDDEN_CALLS and not own) or given.get("shell"):
            found.append(f"{node.lineno}: {name}")
        if name in EXPLICIT:
            argument, value = EXPLICIT[name]
            if given.get(argument) is not value:
                found.append(f"{node.lineno}: {name} without {argument}={value}")
    return found


@pytest.mark.goal("S-a")
@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_unpickles_evaluates_or_opens_a_shell(path: Path) -> None:
    assert faults(ast.parse(path.read_text()), path) == []


@pytest.mark.goal("S-a")
def test_the_lint_sees_what_it_forbids() -> None:
    code = "import pickle\nnp.load(x)\ntorch.load(f, weights_only=False)\nyaml.load(t)\nrun(c, shell=True)\neval(x)"
    assert [fault.partition(":")[0] for fault in faults(ast.parse(code))] == ["1", "2", "3", "4", "5", "6"]


@pytest.mark.goal("S-a")
def test_members_that_unpickle_elsewhere_are_copied_and_never_opened(
    tmp_path: Path, record_property: pytest.RecordProperty
) -> None:
    canary = tmp_path / "executed"
    payload = corpus_tables.pickle.dumps(Canary(canary))
    array = io.BytesIO()
    np.save(array, np.array([Canary(canary)], object), allow_pickle=True)
    shard = Shard()
    suffixes = ("pyd", "pkl", "pickle", "pth", "pt", "ten", "tb", "mp")
    for key in ("a", "b"):
        shard.add(f"{key}.jpg", JPEG).add(f"{key}.txt", f"caption of {key}".encode())
        for suffix in suffixes:
            shard.add(f"{key}.{suffix}", payload)
        shard.add(f"{key}.npy", array.getvalue()).add(f"{key}.cls", b"__import__('os').system('touch canary')")
    pool = tmp_path / "pool"
    pool.mkdir()
    (pool / "0.tar").write_bytes(shard.closed())
    recipe = {"pool": {"format": "webdataset", "path": str(pool)}, "models": {"tiny": {"weights": "tiny"}}}
    run_of(recipe, tmp_path / "run")
    assert not canary.exists()
    assert payload in (tmp_path / "run/filtered/00000000.tar").read_bytes()
    np.load(io.BytesIO(array.getvalue()), allow_pickle=True)
    assert canary.exists()  # the control
    record_property("figure", f"{2 * (len(suffixes) + 1)} pickles in a tar: copied, 0 executed; the control was")


def run_of(recipe: dict[str, Any], directory: Path) -> None:
    curate(Run(Root(f"{directory}/store"), Root(str(directory)), Serial(), Machine()), recipe_of(recipe))


@pytest.mark.goal("S-a")
def test_a_list_with_an_extension_type_is_refused_unopened(tmp_path: Path) -> None:
    canary = tmp_path / "executed"
    (tmp_path / "deny.parquet").write_bytes(corpus_tables.extension(canary))
    pa.register_extension_type(corpus_tables.Opened(corpus_tables.pickle.dumps(None)))
    try:
        recipe = webdataset(webdataset_pool(tmp_path / "pool", 1, 6, 1))
        recipe["select"] = [{"list": {"deny": str(tmp_path / "deny.parquet")}}]
        with pytest.raises(UserError, match="extension types are refused"):
            run_of(recipe, tmp_path / "run")
        assert not canary.exists()
        pq.ParquetFile(tmp_path / "deny.parquet").close()
        assert canary.exists()  # the control: Arrow alone opens it
    finally:
        pa.unregister_extension_type("tests.opened")


def test_weights_of_another_digest_are_refused(tmp_path: Path) -> None:
    recipe = webdataset(webdataset_pool(tmp_path / "pool", 1, 6, 1))
    recipe["models"] = {"clip": {"weights": "tiny", "sha256": "0" * 64}}
    with pytest.raises(UserError, match=r"recipe\.models\.clip: its weights have sha256 [0-9a-f]{64}, not 0{64}"):
        run_of(recipe, tmp_path / "run")


LAUGHS = "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]"


@pytest.mark.goal("S-a")
@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LAUGHS, "anchors and aliases"),
        ("x: !!python/object/apply:os.system ['touch canary']", "could not determine a constructor"),
        ("x: !!python/name:os.system", "could not determine a constructor"),
        ("{" * 100_000, "not valid YAML"),
        ("[" * 5_000, "not valid YAML"),
        ("x: " + "y" * MAX_YAML_BYTES, f"larger than {MAX_YAML_BYTES} bytes"),
        ("a: 1\n---\nb: 2", "not valid YAML"),
        ("x: " + "9" * 10_000, "not valid YAML"),
    ],
    ids=["aliases", "tag", "name", "braces", "brackets", "large", "two documents", "digits"],
)
def test_yaml_that_is_no_recipe_is_refused_at_once(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_yaml(text, "recipe.yaml")


def test_a_large_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    with open(tmp_path / "huge.yaml", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(UserError, match="larger than"):
        load_yaml(tmp_path / "huge.yaml")


HOSTILE = ["../../x", "/etc/passwd", "..", "C:\\x", "a/../../b", "~/x", "%2e%2e/x", "x\ny", "\u202ex", "-rf", "a/b"]
NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=8)


@pytest.mark.goal("S-c")
def test_of_ten_thousand_names_each_is_safe_or_has_a_stand_in(record_property: pytest.RecordProperty) -> None:
    seen = Counter[bool]()

    @settings(max_examples=50, phases=[Phase.generate])
    @given(names=st.lists(NAMES | st.sampled_from(HOSTILE), min_size=200, max_size=200))
    def look(names: list[str]) -> None:
        for name in names:
            key = _safe(name)
            assert unsafe(key) is None
            assert os.path.commonpath(["/run", os.path.normpath(f"/run/{key}.jpg")]) == "/run"
            assert key == name or key.startswith("unsafe-")
            seen[key == name] += 1

    look()
    assert seen.total() == 10_000
    record_property("figure", f"{seen[True]:,} names kept, {seen[False]:,} replaced, 0 outside the root")


@pytest.mark.goal("S-c")
def test_whatever_keys_and_shards_are_called_nothing_is_written_outside_the_run(
    tmp_path: Path, record_property: pytest.RecordProperty
) -> None:
    draw = random.Random(7)
    letters = "abz./\\:~%*?\n\u202e\u00e9\u65e5 '\"<>|&;$-"
    names = [*HOSTILE, *("".join(draw.choices(letters, k=draw.randrange(1, 12))) for _ in range(1000))]
    pool = tmp_path / "pool"
    pool.mkdir()
    data = bytearray()
    for key in names:
        for suffix, content in ((".jpg", JPEG[:64]), (".txt", b"some words")):
            data += member_header(key + suffix, len(content)) + content + padding(len(content))
    for shard in ("-rf .tar", "$(touch canary).tar", "..hidden.tar", "a;b\n.tar", "%2e%2e%2f.tar"):
        (pool / shard).write_bytes(bytes(data) + END)
    recipe = {"pool": {"format": "webdataset", "path": str(pool)}, "limits": {"max_unreadable": 1}}
    run_of(recipe, tmp_path / "run")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pool", "run"]
    assert plain_names(tmp_path / "run")
    written = [
        key for part in (tmp_path / "run/filtered").glob("*.parquet") for key in pq.read_table(part)["key"].to_pylist()
    ]
    assert len(written) > 900
    assert all(unsafe(key) is None for key in written)
    record_property("figure", f"a pool of {len(names):,} hostile keys in 5 hostile shards: nothing outside its run")


def plain_names(run: Path) -> bool:
    """Whether every path below a run is made of the characters that we give names ourselves."""
    allowed = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-/")
    return all(set(path.relative_to(run).as_posix()) <= allowed for path in run.rglob("*"))


SECRET = "canary-7f3a9c"


def hits(folder: Path) -> list[str]:
    """Files that hold the secret in name or content, packed parquet columns included."""
    found = []
    for path in folder.rglob("*"):
        if path.is_file():
            shown = path.read_bytes()
            if shown.startswith(b"PAR1"):
                shown += json.dumps(pq.read_table(path).to_pylist(), default=str).encode()
            if SECRET.encode() in shown or SECRET in path.name:
                found.append(str(path))
    return found


class Server(http.server.SimpleHTTPRequestHandler):
    """Serves files, and ranges of them, at URLs that hold the secret."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        if f"token={SECRET}" not in self.path or not path.is_file():
            self.send_error(404 if f"token={SECRET}" in self.path else 403)
            return
        first, _, last = self.headers.get("Range", "bytes=0-99999999").removeprefix("bytes=").partition("-")
        data = path.read_bytes()[int(first) : int(last) + 1]
        self.send_response(206 if "Range" in self.headers else 200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        return


@pytest.fixture
def served(tmp_path: Path) -> Iterator[str]:
    """URL of a folder with a shard of a pool and a list, to which the secret has to be added."""
    folder = webdataset_pool(tmp_path / "served", 1, 12, 1)
    (folder / "deny.txt").write_text("none\n")
    handler = functools.partial(Server, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://user:{SECRET}@127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.goal("S-b")
def test_no_secret_of_urls_machine_file_or_environment_is_written_or_said(
    tmp_path: Path, served: str, record_property: pytest.RecordProperty
) -> None:
    recipe = {
        "pool": {"format": "webdataset", "path": [f"{served}/00000.tar?token={SECRET}"]},
        "select": [{"list": {"deny": f"{served}/deny.txt?token={SECRET}", "on": "key"}}],
        "limits": {"max_unreadable": 1},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    machine = {"storage_options": {"s3": {"key": SECRET, "secret": SECRET, "token": SECRET}}}
    (tmp_path / "machine.yaml").write_text(json.dumps(machine))
    run = tmp_path / "run"
    where = [str(tmp_path / "recipe.yaml"), "--machine", str(tmp_path / "machine.yaml"), "--executor", "serial"]
    environment = os.environ | {"AWS_SECRET_ACCESS_KEY": SECRET, "RAY_AUTH_TOKEN": SECRET, "HF_TOKEN": SECRET}
    command = [sys.executable, "-c", "import sys; from jobs import cli; sys.exit(cli.main())", "run", *where]
    ran = subprocess.run([*command, "--run", str(run)], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert ran.returncode == 0, ran.stderr
    files = sum(path.is_file() for path in run.rglob("*"))
    assert hits(run) == []
    assert SECRET not in ran.stdout + ran.stderr
    assert "http://127.0.0.1" in (run / "recipe.yaml").read_text()
    wrong = recipe | {"pool": {"format": "webdataset", "path": f"{served}/gone.tar?token={SECRET}"}}
    (tmp_path / "recipe.yaml").write_text(json.dumps(wrong))
    ran = subprocess.run([*command, "--run", str(run)], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert ran.returncode == 2
    assert SECRET not in ran.stdout + ran.stderr
    assert ran.stderr.startswith("pairsieve: pool.path: ")
    record_property("figure", f"10 secrets of recipe, machine and environment: in 0 of {files} files, 0 said")


@pytest.mark.goal("S-b")
@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://me:secret@host/path?token=1#x", "https://host/path"),
        ("https://me:p@ss@host:8080/a@b", "https://host:8080/a@b"),
        ("http://host:8080/a@b", "http://host:8080/a@b"),
        ("https://host?token=1", "https://host"),
        ("s3://KEY:slashed/secret@bucket/0000?.tar", "s3://bucket/0000?.tar"),
        ("s3://bucket/{00..09}.tar?sig=1", "s3://bucket/{00..09}.tar"),
        ("s3://bucket/user@mail/x#y.tar", "s3://bucket/user@mail/x#y.tar"),
        ("abfs://container@account.dfs.core.windows.net/a", "abfs://container@account.dfs.core.windows.net/a"),
        ("abfs://key:secret@account/a", "abfs://account/a"),
        ("/a/local?path=1", "/a/local?path=1"),
    ],
)
def test_a_url_is_shown_without_what_may_be_secret(url: str, shown: str) -> None:
    assert redacted(url) == shown
    assert without_secrets(f"403, url='{url}' (no)") == f"403, url='{shown}' (no)"


@pytest.mark.goal("S-b")
def test_a_redacted_recipe_is_the_same_recipe_but_for_the_secrets() -> None:
    pool = {"format": "webdataset", "path": ["s3://k:s@b/{0..9}.tar", "/local/*.tar"]}
    text = resolved(recipe_of({"pool": pool, "select": [{"list": {"deny": "http://h/d.txt?token=1", "on": "url"}}]}))
    again = recipe_of(parse_yaml(text, "recipe.yaml"))
    assert again.pool.path == ["s3://b/{0..9}.tar", "/local/*.tar"]
    alone = resolved(recipe_of({"pool": pool | {"path": f"http://h/0.tar?token={SECRET}"}}))
    assert SECRET not in alone and "http://h/0.tar" in alone
    assert again.select[0][1] == List(deny="http://h/d.txt", on="url")
    assert resolved(again) == text


@pytest.mark.goal("S-b")
def test_a_machine_does_not_show_its_storage_options(tmp_path: Path) -> None:
    assert SECRET not in repr(Machine(storage_options={"s3": {"secret": SECRET}}))
    (tmp_path / "machine.yaml").write_text(f"storage_options: {{s3: {SECRET}}}")
    with pytest.raises(UserError, match=r"machine\.storage_options\.s3: Input should be an object") as error:
        load_machine(str(tmp_path / "machine.yaml"))
    assert SECRET not in str(error.value)


class Refusing(http.server.BaseHTTPRequestHandler):
    """An object store that refuses every request, and counts them."""

    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        body = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
        self.send_response(403)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_HEAD = do_PUT = do_GET

    def log_message(self, *_: object) -> None:
        return


@pytest.fixture
def refusing() -> Iterator[str]:
    Refusing.asked.clear()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.goal("S-b")
@pytest.mark.parametrize(
    ("key", "pool", "run", "code", "message"),
    [
        (None, "s3://bucket/0.tar", "run", 1, r"s3://bucket/0\.tar: NoCredentialsError: Unable to locate credentials"),
        ("key", "s3://bucket/*.tar", "run", 2, r"pool\.path: .*s3://bucket/?: access refused \(not throttling\)"),
        (None, "pool", "s3://bucket/run", 1, "s3://bucket/run/.*: NoCredentialsError: Unable to locate credentials"),
        ("key", "pool", "s3://bucket/run", 1, r"s3://bucket/run/.*: access refused \(not throttling\)"),
    ],
)
def test_missing_and_refused_credentials_are_one_message(
    tmp_path: Path,
    refusing: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    key: str | None,
    pool: str,
    run: str,
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    if key:
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", key)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    webdataset_pool(tmp_path / "pool", 1, 6, 1)
    (tmp_path / "machine.yaml").write_text(json.dumps({"storage_options": {"s3": {"endpoint_url": refusing}}}))
    (tmp_path / "recipe.yaml").write_text(json.dumps({"pool": {"format": "webdataset", "path": pool}}))
    command = ["run", "recipe.yaml", "--run", run, "--machine", "machine.yaml", "--executor", "serial"]
    assert cli.main(command) == code
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("pairsieve: ")]
    assert len(said) == 1
    assert re.search(message, said[0])
    assert SECRET not in said[0]


def test_urls_in_a_pool_are_never_followed(tmp_path: Path, refusing: str) -> None:
    fields = {"caption": "some words here", "url": f"{refusing}/image", "path": f"pipe:curl {refusing}"}
    shard = Shard()
    for key in ("a", "b"):
        shard.add(f"{key}.jpg", JPEG).add(f"{key}.json", json.dumps(fields).encode())
    (tmp_path / "pool").mkdir()
    (tmp_path / "pool/0.tar").write_bytes(shard.closed())
    pq.write_table(pa.table({"key": ["a", "b", "c"], "url": [fields["url"]] * 3}), tmp_path / "pool/0.parquet")
    recipe = {"pool": {"format": "webdataset", "path": str(tmp_path / "pool")}, "models": {"tiny": {"weights": "tiny"}}}
    run_of(recipe, tmp_path / "run")
    assert Refusing.asked == []


def test_what_is_sent_to_ray_beside_the_code_is_environment_variables_alone() -> None:
    """Ray accepts any misspelled key of a runtime_env in silence."""
    keys = set()
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.keyword) and node.arg == "runtime_env":
                assert isinstance(node.value, ast.Dict)
                keys |= {ast.literal_eval(key) for key in node.value.keys if key}
    assert keys == {"env_vars"}
