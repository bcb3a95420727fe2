"""Bytes in and out: one folder anywhere (local or any fsspec URL), and the files of a unit fetched to local disk.

Rule of the file: an object appears whole under its name or not at all. Locally that is a temporary file in the same
folder, fsync, rename, fsync of the folder; on an object store it is one PUT (reliability.md 1i rule 2).
"""

from __future__ import annotations

import gzip
import hashlib
import os
import random
import tempfile
import time
import uuid
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast
from urllib.parse import urlsplit, urlunsplit

import fsspec

from pipeline.errors import UserError
from pipeline.machine import Machine
from pipeline.stage import LocalFile, Source, Unit

T = TypeVar("T")
BLOCK_BYTES = 1 << 20
ATTEMPTS = 6
"""Tries of one storage call; with doubling, jittered pauses from 0.2 s they last some 12 s (reliability.md S9)."""

TEMPORARY = ".tmp-"
"""What the name of a file begins with that is still being written."""

COMPRESSED = (".gz", ".tgz")

SCHEMES = ("file", "local", "memory", "s3", "gs", "gcs", "az", "abfs", "abfss", "hf", "http", "https")


def scheme_of(url: str) -> str:
    """The fsspec protocol of a URL; `file` for a plain path.

    Raises:
        UserError: the scheme is not one of SCHEMES, or the URL chains several (`::`).
    """
    name = url.split("://", 1)[0] if "://" in url else "file"
    if "::" in url or name not in SCHEMES or url.startswith(("pipe:", "data:")):
        raise UserError(f"{redacted(url)}: only these are read and written: a local path, {', '.join(SCHEMES[2:])}")
    return name


def redacted(url: str) -> str:
    """The URL without user info and query, which may hold secrets; for messages, logs and run.json."""
    if "://" not in url:
        return url
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def filesystem(url: str, options: dict[str, dict[str, Any]]) -> tuple[Any, str]:
    """The fsspec filesystem of a URL, and the URL's path on it.

    Raises:
        UserError: the scheme is refused, or its package is not installed (the message names the extra).
    """
    scheme = scheme_of(url)
    try:
        fs, path = fsspec.core.url_to_fs(url, **options.get(scheme, {}))
    except ImportError as error:
        extra = {"s3": "s3", "gs": "gcs", "gcs": "gcs"}.get(scheme)
        hint = f"pip install 'pairsieve[{extra}]'" if extra else str(error)
        raise UserError(f"{redacted(url)}: {scheme} needs one more package: {hint}") from None
    return fs, path


def is_passing(error: BaseException) -> bool:
    """Whether an error of a storage call is worth another try: throttling, a reset, a time-out; never a 403 or 404."""
    if isinstance(error, (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)):
        return False
    if isinstance(error, (ConnectionError, TimeoutError)):
        return True
    text = f"{type(error).__name__} {error}"
    signs = (
        "SlowDown",
        "Throttl",
        "RequestTimeout",
        "InternalError",
        "ServiceUnavailable",
        "timed out",
        "reset by peer",
    )
    return isinstance(error, OSError) and (
        any(sign in text for sign in signs) or any(f" {c}" in text for c in (500, 502, 503, 504))
    )


def persistently(call: Callable[[], T]) -> T:
    """Do a storage call, again after a passing error; the last error is raised as it is."""
    for attempt in range(ATTEMPTS):
        try:
            return call()
        except OSError as error:
            if attempt == ATTEMPTS - 1 or not is_passing(error):
                raise
            time.sleep(0.2 * 2**attempt * (0.5 + random.random()))
    raise AssertionError("unreachable")


def sync_folder(folder: Path) -> None:
    """Make a rename in a local folder outlive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class Root:
    """A folder, local or on an object store; paths are relative to it, with `/`.

    Raises (all methods): OSError and its kinds, as the file system gives them.
    """

    def __init__(self, url: str, options: dict[str, dict[str, Any]] | None = None) -> None:
        self.url = url.rstrip("/")
        self._fs, self._base = filesystem(self.url, options or {})
        self._local = Path(self._base).absolute() if scheme_of(url) in ("file", "local") else None
        self._base = self._base.rstrip("/")

    def local(self, path: str) -> Path | None:
        """Where a path lies on this machine's disk, or None on an object store."""
        return self._local / path if self._local else None

    def read(self, path: str, start: int | None = None, stop: int | None = None) -> bytes:
        """The bytes [start, stop) of a file; all of it by default."""
        if self._local:
            with open(self._local / path, "rb") as file:
                file.seek(start or 0)
                return file.read() if stop is None else file.read(stop - (start or 0))
        return bytes(persistently(lambda: self._fs.cat_file(f"{self._base}/{path}", start=start, end=stop)))

    def open(self, path: str) -> BinaryIO:
        """A file for reading, seekable; of an object store it is fetched in blocks, as they are asked for."""
        if self._local:
            return open(self._local / path, "rb")
        return cast(BinaryIO, persistently(lambda: self._fs.open(f"{self._base}/{path}", "rb")))

    def write(self, path: str, data: bytes | memoryview) -> None:
        """Put a whole file in place of whatever is there."""
        if self._local:
            with self._temporary(self._local / path) as temporary:
                _write_synced(temporary, data)
                os.replace(temporary, self._local / path)
            sync_folder((self._local / path).parent)
        else:
            persistently(lambda: self._fs.pipe_file(f"{self._base}/{path}", bytes(data)))
            self._check_bytes(path, len(data))

    def create(self, path: str, data: bytes) -> bool:
        """Put a whole file if there is none; False, and nothing changed, where one exists already."""
        if self._local:
            target = self._local / path
            with self._temporary(target) as temporary:
                _write_synced(temporary, data)
                try:
                    os.link(temporary, target)
                except FileExistsError:
                    return False
            sync_folder(target.parent)
            return True
        try:
            persistently(lambda: self._fs.pipe_file(f"{self._base}/{path}", data, mode="create"))
        except FileExistsError:
            # Also the answer to a retry whose first try arrived without its acknowledgement.
            return self.read(path) == data
        return True

    @contextmanager
    def writing(self, path: str) -> Iterator[Path]:
        """Build a large file on local disk; it is published whole when the block ends without an error."""
        if self._local:
            with self._temporary(self._local / path) as temporary:
                yield temporary
                with open(temporary, "rb") as file:
                    os.fsync(file.fileno())
                os.replace(temporary, self._local / path)
            sync_folder((self._local / path).parent)
            return
        with tempfile.TemporaryDirectory() as folder:
            temporary = Path(folder) / "part"
            yield temporary
            persistently(lambda: self._fs.put_file(str(temporary), f"{self._base}/{path}"))
            self._check_bytes(path, temporary.stat().st_size)

    def bytes(self, path: str) -> int | None:
        """Length of a file, or None where there is none."""
        if self._local:
            target = self._local / path
            return target.stat().st_size if target.is_file() else None
        self._fs.invalidate_cache()
        try:
            return int(persistently(lambda: self._fs.info(f"{self._base}/{path}"))["size"])
        except FileNotFoundError:
            return None

    def list(self, folder: str = "") -> dict[str, int]:
        """Every file below a folder: path relative to this root -> bytes, sorted; empty where there is no folder."""
        if self._local:
            found: dict[str, int] = {}
            for where, _, names in os.walk(self._local / folder):
                for name in names:
                    if not name.startswith(TEMPORARY):
                        full = Path(where) / name
                        found[full.relative_to(self._local).as_posix()] = full.stat().st_size
            return dict(sorted(found.items()))
        self._fs.invalidate_cache()
        where = f"{self._base}/{folder}".rstrip("/")
        try:
            listed = persistently(lambda: self._fs.find(where, detail=True))
        except FileNotFoundError:
            return {}
        base = self._fs._strip_protocol(self._base)
        return {p[len(base) :].lstrip("/"): int(i["size"]) for p, i in sorted(listed.items()) if i["type"] == "file"}

    def delete(self, path: str) -> None:
        """Remove a file; no error where there is none."""
        if self._local:
            (self._local / path).unlink(missing_ok=True)
            return
        try:
            persistently(lambda: self._fs.rm_file(f"{self._base}/{path}"))
        except FileNotFoundError:
            return

    @contextmanager
    def _temporary(self, target: Path) -> Iterator[Path]:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.parent / f"{TEMPORARY}{uuid.uuid4().hex}"
        try:
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)

    def _check_bytes(self, path: str, expected: int) -> None:
        found = self.bytes(path)
        if found != expected:
            raise OSError(f"{redacted(self.url)}/{path}: {found} bytes after writing {expected}")


def _write_synced(path: Path, data: bytes | memoryview) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


class UnitFiles:
    """The files of one unit (stage.Files), downloaded and decompressed when asked for, removed when closed."""

    def __init__(self, unit: Unit, machine: Machine, hashing: bool = False) -> None:
        self.unit = unit
        self._machine = machine
        self._hashing = hashing
        self._open: dict[str, LocalFile] = {}
        self._cleanup = ExitStack()

    def __enter__(self) -> UnitFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self._cleanup.close()

    def __contains__(self, role: str) -> bool:
        return role in self.unit.sources

    def open(self, role: str) -> LocalFile:
        if role not in self._open:
            self._open[role] = self._fetch(self.unit.sources[role])
        return self._open[role]

    def read(self, role: str, ranges: Sequence[tuple[int, int]]) -> Iterator[bytes]:
        source = self.unit.sources[role]
        is_local = scheme_of(source.url) in ("file", "local")
        if role in self._open or is_local or source.url.endswith(COMPRESSED):
            with open(self.open(role).path, "rb") as file:
                for start, stop in ranges:
                    file.seek(start)
                    yield file.read(stop - start)
            return
        fs, path = filesystem(source.url, self._machine.storage_options)
        for start, stop in ranges:
            yield persistently(partial(fs.cat_file, path, start=start, end=stop))

    def _fetch(self, source: Source) -> LocalFile:
        fs, path = filesystem(source.url, self._machine.storage_options)
        if scheme_of(source.url) in ("file", "local"):
            stored = Path(path)
        else:
            stored = self._scratch() / Path(path).name
            persistently(lambda: fs.get_file(path, str(stored)))
        found = stored.stat().st_size
        if found != source.bytes:
            raise OSError(f"{redacted(source.url)}: {found} bytes, but {source.bytes} when it was listed")
        digest = sha256_file(stored) if self._hashing else ""
        if not source.url.endswith(COMPRESSED):
            return LocalFile(str(stored), found, digest)
        plain = self._scratch() / "plain"
        damage = _gunzip(stored, plain)
        return LocalFile(str(plain), plain.stat().st_size, digest, damage)

    def _scratch(self) -> Path:
        return Path(self._cleanup.enter_context(tempfile.TemporaryDirectory(dir=self._machine.scratch)))


def sha256_file(path: Path) -> str:
    """Hex digest of a local file, read in blocks."""
    with open(path, "rb") as file:
        return sha256_of(file)


def sha256_of(file: BinaryIO) -> str:
    """Hex digest of an open file, read in blocks."""
    digest = hashlib.sha256()
    while block := file.read(BLOCK_BYTES):
        digest.update(block)
    return digest.hexdigest()


def _gunzip(stored: Path, plain: Path) -> str | None:
    """Decompress as far as the bytes allow; what went wrong, or None."""
    with open(plain, "wb") as out:
        try:
            with gzip.open(stored, "rb") as file:
                while block := file.read(BLOCK_BYTES):
                    out.write(block)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            return str(error)
    return None
