"""The pool as a list of units: a recipe's path in, one Unit per shard out, in pool order.

Folders are listed, never single files: no request per file but over http, which has no listings.
"""

from __future__ import annotations

import itertools
import logging
import os
import posixpath
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from pipeline.errors import UserError
from pipeline.formats import clip_retrieval, datacomp, parquet, webdataset
from pipeline.stage import Source, Unit
from pipeline.storage import filesystem, persistently, redacted, scheme_of, versions_of

log = logging.getLogger(__name__)

FORMATS = {"webdataset": webdataset, "datacomp": datacomp, "parquet": parquet, "clip_retrieval": clip_retrieval}
SHARD_FILE = re.compile(r"(?P<stem>.+?)(?P<suffix>\.tar\.gz|\.tgz|\.tar|\.parquet|\.npz|\.npy)$")
BESIDE = {"webdataset": (".parquet",), "datacomp": (".npz", ".tar", ".tar.gz", ".tgz")}
"""What a pattern that names only the main files leaves out, and a format looks for beside them by the same stem."""

MAX_EXPANSION = 5_000_000
BRACES = re.compile(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}")


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
        if not item:
            raise UserError("pool.path: empty")
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
    """Every file that one item of the recipe names or implies: (path without protocol, file), sorted."""
    place = _Place(item, options)
    patterns = expand_braces(place.path)
    try:
        if patterns == [place.path] and not place.is_glob(place.path):
            if place.is_folder():
                found = dict(place.below(place.path))
            else:
                found = dict(place.match(patterns))
                if not found and not place.exists():
                    raise UserError(f"pool.path: {redacted(item)} does not exist")
        else:
            found = dict(place.match(patterns))
            gone = [p for p in patterns if p not in found and not place.is_glob(p)]
            if gone:
                first = redacted(place.plain(gone[0]))
                log.warning(
                    "pool.path: %d of the %d files of %s are not there; the first is %s",
                    *(len(gone), len(patterns), redacted(item), first),
                )
        found |= place.companions(found, beside)
    except (PermissionError, FileNotFoundError) as error:
        raise UserError(f"pool.path: {redacted(item)}: {error}") from None
    return sorted((place.plain(path), source) for path, source in found.items())


@dataclass(frozen=True)
class _Folder:
    """What one folder holds: paths of the folders in it, and its shard files."""

    folders: list[str]
    files: dict[str, Source]


class _Place:
    """One item's file system, with the listing of each folder kept.

    fsspec's own `find` and `glob` take a folder whose listing failed for an empty one, and would lose its shards.
    """

    def __init__(self, url: str, options: dict[str, dict[str, Any]]) -> None:
        self._scheme = scheme_of(url)
        self._netloc = urlsplit(url).netloc
        self._listed: dict[str, _Folder] = {}
        self.fs, self.path = filesystem(url, options)
        self.fs.invalidate_cache()

    @property
    def _is_http(self) -> bool:
        return self._scheme in ("http", "https")

    def is_glob(self, path: str) -> bool:
        return any(char in path for char in ("*[" if self._is_http else "*?["))

    def is_folder(self) -> bool:
        # Asked about a file, fsspec's http would fetch all of it to look for links.
        if self._is_http:
            return self.path.endswith("/")
        return bool(persistently(lambda: self.fs.isdir(self.path), self._url(self.path)))

    def exists(self) -> bool:
        return bool(persistently(lambda: self.fs.exists(self.path), self._url(self.path)))

    def plain(self, path: str) -> str:
        """A path as it may stand in a shard's name: without protocol, query and leading slash."""
        if self._is_http:
            parts = urlsplit(path)
            path = parts.netloc.rpartition("@")[2] + parts.path
        return path.lstrip("/")

    def below(self, folder: str) -> Iterator[tuple[str, Source]]:
        """The shard files of a folder and of those in it."""
        yield from self._folder(folder).files.items()
        for inner in self._folder(folder).folders:
            yield from self.below(inner)

    def match(self, patterns: Iterable[str]) -> Iterator[tuple[str, Source]]:
        """The shard files that paths and globs name, of those that exist."""
        for pattern in patterns:
            if self.is_glob(pattern):
                root, _, rest = pattern.partition("://") if self._is_http else ("", "", pattern)
                first, *others = rest.split("/")
                yield from self._glob(f"{root}://{first}" if root else first, others)
            elif source := self._file(pattern):
                yield pattern, source

    def _glob(self, folder: str, names: list[str]) -> Iterator[tuple[str, Source]]:
        name, rest = names[0], names[1:]
        if name == "**":
            yield from self._glob(folder, rest or ["*"])
            for inner in self._folder(folder).folders:
                yield from self._glob(inner, names)
        elif not self.is_glob(name):
            path = f"{folder}/{name}"
            if rest:
                yield from self._glob(path, rest)
            elif source := self._file(path):
                yield path, source
        elif rest:
            for inner in self._folder(folder).folders:
                if fnmatchcase(posixpath.basename(inner), name):
                    yield from self._glob(inner, rest)
        else:
            for path, source in self._folder(folder).files.items():
                if fnmatchcase(posixpath.basename(path), name):
                    yield path, source

    def companions(self, found: Iterable[str], suffixes: tuple[str, ...]) -> dict[str, Source]:
        """Files with the stems of those found and other suffixes, in the same folders or in `shards` beside them."""
        stems = {_stem(path) for path in found}
        if self._is_http:
            paths = (stem + suffix for stem in stems for suffix in suffixes if "?" not in stem)
            return {path: source for path in paths if (source := self._file(path))}
        names = {posixpath.basename(stem) for stem in stems}
        folders = {posixpath.dirname(stem) for stem in stems} if suffixes else set()
        folders |= {posixpath.join(posixpath.dirname(folder), "shards") for folder in folders if ".npz" in suffixes}
        return {
            path: source
            for folder in sorted(folders)
            for path, source in self._folder(folder).files.items()
            if path.endswith(suffixes) and posixpath.basename(_stem(path)) in names
        }

    def _file(self, path: str) -> Source | None:
        if not self._is_http:
            return self._folder(posixpath.dirname(path)).files.get(path)
        try:
            return self._source(persistently(lambda: self.fs.info(path), self._url(path)))
        except FileNotFoundError:
            return None

    def _folder(self, folder: str) -> _Folder:
        if folder not in self._listed:
            is_local = self._scheme in ("file", "local")
            self._listed[folder] = _scanned(folder or "/") if is_local else self._asked(folder)
        return self._listed[folder]

    def _asked(self, folder: str) -> _Folder:
        try:
            infos = persistently(lambda: self.fs.ls(folder, detail=True), self._url(folder))
        except (FileNotFoundError, NotADirectoryError):
            infos = []
        # Some stores list a folder's own marker in it.
        infos = [info for info in infos if info["name"].strip("/") != folder.strip("/")]
        folders = [info["name"].rstrip("/") for info in infos if info["type"] == "directory"]
        files = [info for info in infos if info["type"] != "directory" and _is_shard_file(info["name"])]
        return _Folder(sorted(folders), {info["name"]: self._source(info) for info in files})

    def _source(self, info: dict[str, Any]) -> Source:
        path = info["name"]
        if info.get("size") is None:
            info = persistently(lambda: self.fs.info(path), self._url(path))
            if info.get("size") is None:
                raise UserError(f"pool.path: {redacted(path)}: the server does not tell its length")
        return Source(self._url(path), int(info["size"]), next(iter(versions_of(info)), ""))

    def _url(self, path: str) -> str:
        """The path as a URL with the item's own protocol, and the account that some write into the bucket's place."""
        if self._is_http:
            return path
        if self._scheme == "memory":
            return f"memory://{path}"
        return f"{self._scheme}://{self._netloc}/{path.partition('/')[2]}"


def _scanned(folder: str) -> _Folder:
    """A local folder; links to folders are followed, but not round in circles: a link that leads upwards is none."""
    listed = _Folder([], {})
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except (FileNotFoundError, NotADirectoryError):
        return listed
    real = os.path.realpath(folder)
    for entry in entries:
        if entry.is_dir():
            if not (entry.is_symlink() and f"{real}/".startswith(f"{os.path.realpath(entry.path)}/")):
                listed.folders.append(entry.path)
        elif _is_shard_file(entry.path):
            status = entry.stat()
            listed.files[entry.path] = Source(entry.path, status.st_size, str(status.st_mtime_ns))
    return listed


def _is_shard_file(path: str) -> bool:
    name = posixpath.basename(urlsplit(path).path if "://" in path else path)
    return not name.startswith(".") and SHARD_FILE.match(name) is not None


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
