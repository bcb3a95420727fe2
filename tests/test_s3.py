"""The whole path on object stores: the same bytes as on local disk, and only one winner where two create an object."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from moto.server import ThreadedMotoServer

from pipeline.curate import curate
from pipeline.executor import Serial
from pipeline.machine import Machine
from pipeline.recipe import recipe_of
from pipeline.run import Run
from pipeline.storage import Root
from tests.pools import datacomp_pool, webdataset_pool
from tests.runs import datacomp, webdataset
from tests.trees import comparable

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

Options = dict[str, dict[str, Any]]
LAYOUTS: dict[str, tuple[Callable[..., Path], Callable[..., dict[str, Any]]]] = {
    "webdataset": (webdataset_pool, webdataset),
    "datacomp": (datacomp_pool, datacomp),
}


@pytest.fixture(scope="module")
def s3() -> Iterator[Options]:
    """Options for a server that speaks S3's protocol, with an empty bucket."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    options = {"s3": {"endpoint_url": f"http://{host}:{port}", "key": "nobody", "secret": "nothing"}}
    fsspec.filesystem("s3", **options["s3"]).mkdir("bucket")
    yield options
    server.stop()


def written(recipe: dict[str, Any], url: str, options: Options) -> dict[str, bytes]:
    """Run a recipe into a folder anywhere; its files that have to be equal, but for the recipe with the pool's URL."""
    directory = Root(url, options)
    run = Run(Root(f"{url}/store", options), directory, Serial(), Machine(storage_options=options))
    curate(run, recipe_of(recipe), group_units=2)
    files = comparable({path: directory.read(path) for path in directory.list() if not path.startswith("store/")})
    del files["recipe.yaml"]
    lines = files["checksums.sha256"].splitlines(keepends=True)
    return files | {"checksums.sha256": b"".join(line for line in lines if b"  recipe.yaml" not in line)}


@pytest.mark.goal("R5")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("base", ["s3://bucket", "memory://bucket"])
def test_a_pool_and_a_run_on_an_object_store_give_the_bytes_of_local_ones(
    s3: Options, tmp_path: Path, base: str, layout: str, record_property: pytest.RecordProperty
) -> None:
    make, recipe = LAYOUTS[layout]
    pool = make(tmp_path / "pool", 2, 25, 1)
    url = f"{base}/{layout}"
    there = Root(f"{url}/pool", s3)
    for path in pool.iterdir():
        there.write(path.name, path.read_bytes())
    local = written(recipe(pool), str(tmp_path / "run"), {})
    wanted = recipe(pool) | {"pool": {"format": layout, "path": f"{url}/pool"}}
    found = written(wanted, f"{url}/run", s3)
    assert [name for name in local.keys() | found.keys() if found.get(name) != local.get(name)] == []
    record_property("figure", f"{layout} on {base.partition(':')[0]}: {len(local)} files as on local disk")


@pytest.mark.goal("R5")
@pytest.mark.parametrize("base", ["s3://bucket", "memory://bucket"])
def test_of_many_that_create_one_object_one_wins(s3: Options, base: str) -> None:
    root = Root(f"{base}/race", s3)
    won: list[int] = []
    ready = threading.Barrier(8)

    def create(number: int) -> None:
        ready.wait()
        if root.create("receipts/x.json", f"attempt {number}".encode()):
            won.append(number)

    attempts = [threading.Thread(target=create, args=(number,)) for number in range(8)]
    for attempt in attempts:
        attempt.start()
    for attempt in attempts:
        attempt.join()
    assert len(won) == 1
    assert root.read("receipts/x.json") == f"attempt {won[0]}".encode()
    assert root.create("receipts/x.json", f"attempt {won[0]}".encode()), "its own, again"


def test_what_s3_refuses_is_not_taken_for_throttling_and_a_missing_bucket_is_named(s3: Options) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Root("s3://nowhere/run", s3).write("a", b"1")
    assert Root("s3://bucket/empty", s3).list() == {}
    assert Root("s3://bucket/empty", s3).bytes("a") is None
