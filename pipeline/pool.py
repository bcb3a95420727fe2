"""The pool as a list of units: a recipe's path in, one Unit per shard out, in pool order.

Folders are listed, never single files: no request per file but over http, which has no listings.
"""

from __future__ import annotations

import itertools
import os
import posixpath
import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from pipeline.errors import UserError
from pipeline.formats import clip_retrieval, datacomp, parquet, webdataset
from pipeline.stage import Source, Unit
from pipeline.storage import filesystem, persistently, redacted, scheme_of

FORMATS = {"webdataset": webdataset, "datacomp": datacomp, "parquet": parquet, "clip_retrieval": clip_retrieval}
SHARD_FILE = re.compile(r"(?P<stem>.+?)(?P<suffix>\.tar\.gz|\.tgz|\.tar|\.parquet|\.npz|\.npy)$")
BESIDE = {"webdataset": (".parquet",), "datacomp": (".npz", ".tar", ".tar.gz", ".tgz")}
"""What a pattern that names only the main files leaves out, and a format looks for beside them by the same stem."""

MAX_EXPANSION = 5_000_000
BRACES = re.compile(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}")
ETAGS = ("ETag", "etag", "md5Hash", "generation", "content_md5", "Content-MD5", "blob_id")
TIMES = ("mtime", "LastModified", "last_modified", "Last-Modified", "updated", "created")


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Pool:
    """Where the candidates are and how they lie there."""

    format: Literal["webdataset", "datacomp", "parquet", "clip_retrieval"]
    path: str | list[str]
    """Local path or fsspec URL: a file, a glob, a brace pattern as in {00000..00999}, a folder, or a list of these."""


def list_units(pool: Pool, storage_options: dict[str, dict[str, Any]]) -> list[Unit]:
    """List the shards of a pool.

    Args:
        pool: its format and path.
        storage_options: fsspec options by protocol.

    Returns:
        One unit per shard; `shard` is the main file's path below the folder that all main files share. Globs, brace
        patterns and folders are sorted; the items of a list keep the recipe's order.

    Raises:
        UserError: a named file or everything is missing, a file is listed twice, or the URL is refused; names it.
        OSError: storage failed.
    """
    units: list[Unit] = []
    for item in [pool.path] if isinstance(pool.path, str) else pool.path:
        grouped = FORMATS[pool.format].group(_found(item, BESIDE.get(pool.format, ()), storage_options))
        if not grouped:
            raise UserError(f"pool.path: no {pool.format} shard found in {redacted(item)}")
        units += grouped
    if not units:
        raise UserError("pool.path: an empty list")
    seen: set[str] = set()
    for unit in units:
        if unit.shard in seen:
            raise UserError(f"pool.path: {unit.shard} is listed twice")
        seen.add(unit.shard)
    folders = {posixpath.dirname(unit.shard) for unit in units}
    shared = posixpath.commonpath(folders)
    return [replace(unit, shard=unit.shard[len(shared) :].lstrip("/")) for unit in units]


def _found(item: str, beside: tuple[str, ...], options: dict[str, dict[str, Any]]) -> list[tuple[str, Source]]:
    """Every file that one item of the recipe names or implies: (path without protocol and bucket's slash, file)."""
    place = _Place(item, options)
    patterns = expand_braces(place.path)
    plain = patterns == [place.path] and not place.is_glob(place.path)
    if plain and place.is_folder():
        infos = persistently(lambda: place.fs.find(place.path, detail=True))
    else:
        infos = place.match(patterns)
        if plain and not infos:
            raise UserError(f"pool.path: {redacted(item)} does not exist")
        infos |= place.companions(infos, beside)
    files = {}
    for path, info in infos.items():
        name = posixpath.basename(path)
        if info["type"] != "directory" and not name.startswith(".") and SHARD_FILE.match(place.plain(path)):
            files[place.plain(path)] = place.source(path, info)
    return sorted(files.items())


class _Place:
    """One item's file system, with the listing of each folder kept."""

    def __init__(self, url: str, options: dict[str, dict[str, Any]]) -> None:
        self.scheme = scheme_of(url)
        self.fs, self.path = filesystem(url, options)
        self._netloc = urlsplit(url).netloc
        self._listed: dict[str, dict[str, Any]] = {}

    def is_glob(self, path: str) -> bool:
        return any(char in path for char in ("*[" if self._is_http else "*?["))

    def is_folder(self) -> bool:
        # Asked about a file, fsspec's http would fetch all of it to look for links.
        return self.path.endswith("/") if self._is_http else bool(self.fs.isdir(self.path))

    @property
    def _is_http(self) -> bool:
        return self.scheme in ("http", "https")

    def plain(self, path: str) -> str:
        """A path as it may stand in a shard's name: without protocol, query and leading slash."""
        if self._is_http:
            parts = urlsplit(path)
            path = parts.netloc.rpartition("@")[2] + parts.path
        return path.lstrip("/")

    def match(self, patterns: Iterable[str]) -> dict[str, Any]:
        """The files that paths and globs name, of those that exist."""
        found: dict[str, Any] = {}
        for pattern in patterns:
            if self.is_glob(pattern):
                found |= persistently(lambda p=pattern: self.fs.glob(p, detail=True))  # type: ignore[misc]
            elif info := self._info(pattern):
                found[pattern] = info
        return found

    def companions(self, found: dict[str, Any], suffixes: tuple[str, ...]) -> dict[str, Any]:
        """Files with the stems of those found and other suffixes, in the same folders or in `shards` beside them."""
        stems = {_stem(path) for path in found}
        if self._is_http:
            paths = (stem + suffix for stem in stems for suffix in suffixes if "?" not in stem)
            return {path: info for path in paths if (info := self._info(path))}
        names = {posixpath.basename(stem) for stem in stems}
        folders = {posixpath.dirname(path) for path in found} if suffixes else set()
        folders |= {posixpath.join(posixpath.dirname(folder), "shards") for folder in folders if ".npz" in suffixes}
        return {
            path: info
            for folder in sorted(folders)
            for path, info in self._folder(folder).items()
            if path.endswith(suffixes) and posixpath.basename(_stem(path)) in names
        }

    def _info(self, path: str) -> Any:
        """What the store says of one file; None where there is none."""
        if not self._is_http:
            return self._folder(posixpath.dirname(path)).get(path)
        try:
            return persistently(lambda: self.fs.info(path))
        except FileNotFoundError:
            return None

    def _folder(self, folder: str) -> dict[str, Any]:
        if folder not in self._listed:
            try:
                infos = persistently(lambda: self.fs.ls(folder, detail=True))
            except (FileNotFoundError, NotADirectoryError):
                infos = []
            self._listed[folder] = {info["name"]: info for info in infos}
        return self._listed[folder]

    def source(self, path: str, info: Any) -> Source:
        if self.scheme in ("file", "local"):
            status = os.stat(path)
            return Source(path, status.st_size, str(status.st_mtime_ns))
        if info.get("size") is None:
            info = persistently(lambda: self.fs.info(path))
            if info.get("size") is None:
                raise UserError(f"pool.path: {redacted(path)}: the server does not tell its length")
        etag = next((str(info[name]) for name in (*ETAGS, *TIMES) if info.get(name) is not None), "")
        return Source(self._url(path), int(info["size"]), etag.strip('"'))

    def _url(self, path: str) -> str:
        """The path as a URL with the item's own protocol, and the account that some write into the bucket's place."""
        if self._is_http:
            return path
        if self.scheme == "memory":
            return f"memory://{path}"
        return f"{self.scheme}://{self._netloc}/{path.partition('/')[2]}"


def _stem(path: str) -> str:
    match = SHARD_FILE.match(path)
    return match["stem"] if match else path


def expand_braces(pattern: str) -> list[str]:
    """Every path that a pattern names: `{00000..00999}` counts with its zeros, `{a,b}` chooses.

    Raises:
        UserError: a range runs backwards, or the pattern names more than 5,000,000 paths.
    """
    pieces: list[list[str]] = []
    end = 0
    total = 1
    for match in BRACES.finditer(pattern):
        first, last, choices = match.groups()
        numbers = range(0) if choices else range(int(first), int(last) + 1)
        names: Iterable[str] = choices.split(",") if choices else (f"{n:0{len(first)}d}" for n in numbers)
        if not choices and not numbers:
            raise UserError(f"pool.path: {match.group()} runs backwards")
        total *= choices.count(",") + 1 if choices else len(numbers)
        if total > MAX_EXPANSION:
            raise UserError(f"pool.path: {match.group()} names more than {MAX_EXPANSION} files")
        pieces += [[pattern[end : match.start()]], list(names)]
        end = match.end()
    return ["".join(parts) for parts in itertools.product(*pieces, [pattern[end:]])]
