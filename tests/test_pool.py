import os
import threading
from hashlib import md5
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given
from hypothesis import strategies as st
from moto.server import ThreadedMotoServer
from pydantic import ValidationError

from pipeline.errors import UserError
from pipeline.pool import Pool, expand_braces, list_units


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x" * len(name))
    return folder


def shards(format, path, options=None):
    path = [str(p) for p in path] if isinstance(path, list) else str(path)
    return [unit.shard for unit in list_units(Pool(format=format, path=path), options or {})]


def roles(format, path):
    return {unit.shard: sorted(unit.sources) for unit in list_units(Pool(format=format, path=str(path)), {})}


@pytest.fixture
def memory():
    fs = fsspec.filesystem("memory")
    fs.rm("/pool_test", recursive=True) if fs.exists("/pool_test") else None
    yield fs
    fs.rm("/pool_test", recursive=True) if fs.exists("/pool_test") else None


@pytest.mark.parametrize(
    ("pattern", "paths"),
    [
        ("a.tar", ["a.tar"]),
        ("{08..11}.tar", ["08.tar", "09.tar", "10.tar", "11.tar"]),
        ("{8..11}.tar", ["8.tar", "9.tar", "10.tar", "11.tar"]),
        ("{a,b}/{1..2}", ["a/1", "a/2", "b/1", "b/2"]),
        ("{a,}x", ["ax", "x"]),
        ("a{1}.tar", ["a{1}.tar"]),
    ],
)
def test_braces_worked_by_hand(pattern, paths):
    assert expand_braces(pattern) == paths


@given(st.integers(0, 500), st.integers(0, 50), st.integers(1, 6))
def test_a_range_counts_with_the_zeros_of_its_first_number(first, more, width):
    last = first + more
    expected = [f"x{n:0{width}d}" for n in range(first, last + 1)]
    assert expand_braces(f"x{{{first:0{width}d}..{last}}}") == (
        expected if width >= len(str(first)) else [f"x{n}" for n in range(first, last + 1)]
    )


def test_a_range_that_runs_backwards_is_refused():
    with pytest.raises(UserError, match=r"pool.path: \{5\.\.4\} runs backwards"):
        expand_braces("{5..4}.tar")


@pytest.mark.parametrize("path", ["", [""], []])
def test_a_pool_that_names_nothing_is_refused(path):
    with pytest.raises(UserError, match=r"pool.path: (empty|an empty list)"):
        list_units(Pool(format="webdataset", path=path), {})


def test_a_pattern_of_endless_names_is_refused_at_once():
    with pytest.raises(UserError, match="names more than 5000000 files"):
        expand_braces("{0..9999}/{0..99999999999999}.tar")


@pytest.mark.parametrize("how", ["folder", "glob", "brace", "list", "url"])
def test_every_way_to_name_the_same_shards_gives_the_same_units(tmp_path, how):
    touch(tmp_path, "00000.tar", "00000.parquet", "00002.tar", "00002.parquet", "00002_stats.json")
    path = {
        "folder": str(tmp_path),
        "glob": f"{tmp_path}/*.tar",
        "brace": f"{tmp_path}/{{00000..00005}}.tar",
        "list": [f"{tmp_path}/00000.tar", f"{tmp_path}/00002.tar"],
        "url": f"file://{tmp_path}/0000?.tar",
    }[how]
    units = list_units(Pool(format="webdataset", path=path), {})
    assert [(unit.shard, sorted(unit.sources)) for unit in units] == [
        ("00000.tar", ["sidecar", "tar"]),
        ("00002.tar", ["sidecar", "tar"]),
    ]
    status = os.stat(tmp_path / "00002.tar")
    source = units[1].sources["tar"]
    assert (source.url, source.bytes, source.etag) == (
        str(tmp_path / "00002.tar"),
        status.st_size,
        str(status.st_mtime_ns),
    )


def test_files_that_a_brace_pattern_names_and_nobody_has_are_counted(tmp_path, caplog):
    touch(tmp_path, "00000.tar", "00002.tar")
    assert shards("webdataset", f"{tmp_path}/{{00000..00003}}.tar") == ["00000.tar", "00002.tar"]
    place = str(tmp_path).lstrip("/")
    said = f"2 of the 4 files of {tmp_path}/{{00000..00003}}.tar are not there; the first is {place}/00001.tar"
    assert said in caplog.text
    caplog.clear()
    assert shards("webdataset", f"{tmp_path}/{{00000,00002}}.tar") == ["00000.tar", "00002.tar"]
    assert not caplog.text


def test_shards_are_named_below_the_folder_that_all_share(tmp_path):
    touch(tmp_path, "x/a/1.tar", "x/b/1.tar", "x/b/c/2.tar", "other/1.parquet")
    assert shards("webdataset", tmp_path) == ["a/1.tar", "b/1.tar", "b/c/2.tar"]
    assert shards("webdataset", tmp_path / "x/b/c/2.tar") == ["2.tar"]
    assert shards("webdataset", [tmp_path / "x/b", tmp_path / "x/a"]) == ["b/1.tar", "b/c/2.tar", "a/1.tar"]


def test_a_shared_beginning_of_names_is_no_shared_folder(tmp_path):
    touch(tmp_path, "part1/0.tar", "part10/0.tar")
    assert shards("webdataset", tmp_path) == ["part1/0.tar", "part10/0.tar"]


def test_a_list_keeps_its_order_and_sorts_each_item(tmp_path):
    touch(tmp_path, "b/2.tar", "b/1.tar", "a/9.tar")
    assert shards("webdataset", [f"{tmp_path}/b/*.tar", f"{tmp_path}/a"]) == ["b/1.tar", "b/2.tar", "a/9.tar"]


def test_hidden_and_foreign_files_are_no_shards(tmp_path):
    touch(tmp_path, "1.tar", "._1.tar", ".tmp-9.parquet", "readme.txt", "1_stats.json", "3.tar.gz", "4.TAR")
    assert shards("webdataset", tmp_path) == ["1.tar", "3.tar.gz"]


def test_a_glob_of_one_suffix_does_not_take_the_other(tmp_path):
    touch(tmp_path, "1.tar", "1.tar.gz", "1.parquet")
    assert roles("webdataset", tmp_path / "*.tar") == {"1.tar": ["sidecar", "tar"]}


def test_datacomp_finds_arrays_and_tars_by_stem(tmp_path):
    touch(tmp_path, "m/a.parquet", "m/a.npz", "m/b.parquet", "m/b.tar", "m/c.npz")
    expected = {"a.parquet": ["npz", "sidecar"], "b.parquet": ["sidecar", "tar"]}
    assert roles("datacomp", tmp_path) == roles("datacomp", tmp_path / "m/*.parquet") == expected
    assert roles("datacomp", tmp_path / "m/{a,b,z}.parquet") == expected


def test_datacomp_joins_folders_of_metadata_and_shards_by_stem(tmp_path):
    touch(tmp_path, "metadata/0.parquet", "metadata/0.npz", "shards/0.tar", "shards/0.parquet", "shards/1.tar")
    expected = {"0.parquet": ["npz", "sidecar", "tar"]}
    assert roles("datacomp", tmp_path) == roles("datacomp", tmp_path / "metadata/*.parquet") == expected
    unit = list_units(Pool(format="datacomp", path=str(tmp_path)), {})[0]
    assert unit.sources["sidecar"].url.endswith("metadata/0.parquet")


def test_commonpool_whose_shards_have_other_names_is_metadata_alone(tmp_path):
    touch(tmp_path, "metadata/ab.parquet", "metadata/ab.npz", "shards/00000000.tar", "shards/00000000.parquet")
    assert roles("datacomp", tmp_path) == {"ab.parquet": ["npz", "sidecar"]}


def test_clip_retrieval_joins_folders_by_number(tmp_path):
    touch(tmp_path, *(f"{n}/{n}_{i}.npy" for n in ("img_emb", "text_emb") for i in ("00", "01")))
    touch(tmp_path, "metadata/metadata_00.parquet", "metadata/metadata_01.parquet", "metadata/metadata_02.parquet")
    (tmp_path / "text_emb/text_emb_01.npy").unlink()
    assert roles("clip_retrieval", tmp_path) == {
        "metadata_00.parquet": ["img_emb", "metadata", "text_emb"],
        "metadata_01.parquet": ["img_emb", "metadata"],
        "metadata_02.parquet": ["metadata"],
    }


def test_a_file_that_does_not_exist_is_named(tmp_path):
    touch(tmp_path, "1.tar")
    for path in (f"{tmp_path}/2.tar", [f"{tmp_path}/1.tar", f"{tmp_path}/2.tar"], f"{tmp_path}/no/such"):
        with pytest.raises(UserError, match=r"pool.path: .*(2\.tar|such) does not exist"):
            shards("webdataset", path)


@pytest.mark.parametrize("path", ["*.tar", "{0..3}.tar", "", "b.parquet"])
def test_a_pool_without_a_shard_is_refused(tmp_path, path):
    touch(tmp_path, "b.parquet")
    with pytest.raises(UserError, match=r"pool.path: no webdataset shard found in "):
        shards("webdataset", f"{tmp_path}/{path}")


def test_an_empty_list_is_refused():
    with pytest.raises(UserError, match=r"pool\.path: an empty list"):
        shards("webdataset", [])


def test_a_shard_listed_twice_is_refused(tmp_path):
    touch(tmp_path, "1.tar")
    with pytest.raises(UserError, match=r"1\.tar is listed twice"):
        shards("webdataset", [f"{tmp_path}/1.tar", f"{tmp_path}/*.tar"])


@pytest.mark.parametrize("path", ["pipe:cat x.tar", "zip://a.tar::file://b.zip", "ssh://host/a.tar", "data:x,y"])
def test_commands_chains_and_other_protocols_are_refused(path):
    with pytest.raises(UserError):
        shards("webdataset", path)


def test_a_recipe_with_unknown_keys_or_formats_is_refused():
    with pytest.raises(ValidationError):
        Pool(format="zip", path="x")
    with pytest.raises(ValidationError):
        Pool(format="webdataset", path="x", glob="y")


@pytest.mark.parametrize(
    "path", ["memory://pool_test", "memory://pool_test/*/*.tar", "memory:///pool_test/{a,b}/0.tar"]
)
def test_object_stores_are_listed_without_reading(memory, path):
    memory.pipe({"/pool_test/a/0.tar": b"1", "/pool_test/b/0.tar": b"22", "/pool_test/b/0.parquet": b"333"})
    units = list_units(Pool(format="webdataset", path=path), {})
    assert [unit.shard for unit in units] == ["a/0.tar", "b/0.tar"]
    assert {role: source.bytes for role, source in units[1].sources.items()} == {"tar": 2, "sidecar": 3}
    assert all(memory.cat_file(unit.sources["tar"].url) for unit in units)
    assert units[0].sources["tar"].etag


def test_a_rewritten_file_has_another_etag(tmp_path, memory):
    touch(tmp_path, "1.tar")
    memory.pipe("/pool_test/1.tar", b"1")
    for folder, rewrite in (
        (str(tmp_path), lambda: os.utime(tmp_path / "1.tar", ns=(1, 1))),
        ("memory://pool_test", lambda: memory.pipe("/pool_test/1.tar", b"2")),
    ):
        pool = Pool(format="webdataset", path=folder)
        before = list_units(pool, {})
        assert list_units(pool, {}) == before
        rewrite()
        assert list_units(pool, {})[0].sources["tar"].etag != before[0].sources["tar"].etag


def test_a_folder_that_cannot_be_listed_is_an_error_and_not_empty():
    class Unreadable(MemoryFileSystem):
        """A memory file system, one folder of which is forbidden."""

        protocol = "memory"
        cachable = False

        def ls(self, path, detail=True, **kwargs):
            if path.rstrip("/").endswith("forbidden"):
                raise PermissionError(f"{path}: AccessDenied")
            return super().ls(path, detail, **kwargs)

    fsspec.register_implementation("memory", Unreadable, clobber=True)
    try:
        fs = Unreadable()
        fs.pipe({"/pool_test/a/0.tar": b"1", "/pool_test/forbidden/0.tar": b"2"})
        for path in ("memory://pool_test", "memory://pool_test/*/*.tar", "memory://pool_test/**/*.tar"):
            with pytest.raises(UserError, match=r"pool\.path: memory://pool_test.*: .*forbidden: AccessDenied"):
                shards("webdataset", path)
    finally:
        fs.rm("/pool_test", recursive=True)
        fsspec.register_implementation("memory", MemoryFileSystem, clobber=True)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("a/*.tar", ["1.tar", "2.tar"]),
        ("*/1.tar", ["a/1.tar", "b/1.tar"]),
        ("**/*.tar", ["0.tar", "a/1.tar", "a/2.tar", "b/1.tar", "b/c/3.tar"]),
        ("b/**", ["1.tar", "c/3.tar"]),
        ("**/c/*", ["3.tar"]),
        ("[ab]/[!2].tar", ["a/1.tar", "b/1.tar"]),
        ("?/?.tar", ["a/1.tar", "a/2.tar", "b/1.tar"]),
        ("{a,b}/*1.tar", ["a/1.tar", "b/1.tar"]),
    ],
)
@pytest.mark.parametrize("store", ["local", "memory"])
def test_globs_worked_by_hand(tmp_path, memory, store, pattern, expected):
    names = ["0.tar", "a/1.tar", "a/2.tar", "b/1.tar", "b/c/3.tar", "b/.4.tar", "b/note.txt"]
    touch(tmp_path, *names)
    memory.pipe({f"/pool_test/{name}": b"x" for name in names})
    assert shards("webdataset", f"{tmp_path if store == 'local' else 'memory://pool_test'}/{pattern}") == expected


def test_links_to_folders_are_followed_once(tmp_path):
    touch(tmp_path, "far/1.tar", "pool/0.tar")
    (tmp_path / "pool/near").symlink_to(tmp_path / "far")
    (tmp_path / "pool/up").symlink_to(tmp_path / "pool")
    assert shards("webdataset", tmp_path / "pool") == ["0.tar", "near/1.tar"]


def test_a_link_to_nowhere_is_named(tmp_path):
    touch(tmp_path, "0.tar")
    (tmp_path / "1.tar").symlink_to(tmp_path / "gone.tar")
    with pytest.raises(UserError, match=r"pool\.path: .*1\.tar"):
        shards("webdataset", tmp_path)


def test_http_shards_are_asked_for_one_by_one(tmp_path):
    touch(tmp_path, "00000.tar", "00002.tar", "00002.parquet")
    asked = []

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(tmp_path))

        def log_request(self, code="-", size="-"):
            asked.append((self.command, self.path, int(code)))

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        base = f"http://127.0.0.1:{server.server_port}"
        try:
            pool = Pool(format="webdataset", path=f"{base}/{{00000..00002}}.tar")
            units = list_units(pool, {})
            with pytest.raises(UserError, match=r"/00007\.tar does not exist"):
                shards("webdataset", f"{base}/00007.tar?token=secret")
        finally:
            server.shutdown()
            thread.join()
    assert [(unit.shard, sorted(unit.sources)) for unit in units] == [
        ("00000.tar", ["tar"]),
        ("00002.tar", ["sidecar", "tar"]),
    ]
    assert units[1].sources["tar"].bytes == len("00002.tar")
    assert units[1].sources["tar"].url == f"{base}/00002.tar"
    assert not [line for line in asked if line[0] == "GET" and line[2] == 200]


def test_the_choices_of_a_brace_pattern_are_sorted_too(tmp_path):
    touch(tmp_path, "a/1.parquet", "b/1.parquet")
    assert shards("parquet", f"{tmp_path}/{{b,a}}/1.parquet") == ["a/1.parquet", "b/1.parquet"]


def test_a_pool_on_s3_is_listed_afresh_each_time():
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        options = {"s3": {"endpoint_url": f"http://{host}:{port}", "key": "k", "secret": "s"}}
        fs = fsspec.filesystem("s3", **options["s3"])
        fs.mkdir("listed")  # a name of its own: all servers of a process hold the same buckets
        fs.pipe_file("listed/pool/0.tar", b"12")
        path = "s3://listed/pool/*.tar"
        [unit] = list_units(Pool(format="webdataset", path=path), options)
        # Written by somebody else: this process's cached listing knows nothing of it.
        fsspec.filesystem("s3", **options["s3"], skip_instance_cache=True).pipe_file("listed/pool/1.tar", b"3")
        assert shards("webdataset", path, options) == ["0.tar", "1.tar"]
    finally:
        server.stop()
    source = unit.sources["tar"]
    assert (source.url, source.bytes, source.etag) == ("s3://listed/pool/0.tar", 2, md5(b"12").hexdigest())
