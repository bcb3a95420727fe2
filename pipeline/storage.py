"""Bytes in and out: one folder anywhere (local or any fsspec URL), and the files of a unit fetched to local disk.

Rule of the file: an object appears whole under its name or not at all. Locally that is a temporary file in the same
folder, fsync, rename, fsync of the folder; on an object store it is one PUT, looked at afterwards. Every call to an
object store waits its turn, is tried again after an error that passes, and must give as many bytes as it should.
"""

from __future__ import annotations

import errno
import gzip
import hashlib
import os
import random
import re
import tempfile
import threading
import time
import uuid
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeVar, cast

import fsspec

from pipeline.errors import UserError
from pipeline.machine import Machine
from pipeline.stage import LocalFile, Source, Unit

T = TypeVar("T")
BLOCK_BYTES = 1 << 20
ATTEMPTS = 6
"""Tries of one storage call; with doubling, jittered pauses from PAUSE_S they last some 12 s."""

PAUSE_S = 0.2

REQUESTS_PER_S = 1000
"""Of one process to one prefix (bucket and first folder), after a burst of as many; S3 takes some 3,500 in all."""

PASSING_ERRORS = (errno.EBUSY, errno.EAGAIN, errno.EREMOTEIO, errno.ETIMEDOUT, errno.EPIPE)
"""What s3fs makes of 503 SlowDown and 500; its text then no longer says so."""

PASSING_SIGNS = re.compile(
    "SlowDown|Throttl|Timeout|InternalError|ServiceUnavailable|timed out|reset by peer"
    "|ConnectionError|ConnectionClosed|Disconnected|IncompleteRead|PayloadError"
)
PASSING_CODES = re.compile(r"\b(429|500|502|503|504)\b")

NETWORK = ("aiohttp", "azure", "botocore", "gcsfs", "huggingface_hub", "requests")
"""Packages below fsspec whose own errors are no OSError."""

MD5 = re.compile(r"[0-9a-f]{32}")
"""An etag that may be the MD5 of the object: of one PUT to S3 without a key of the user's."""

TEMPORARY = ".tmp-"
"""What the name of a file begins with that is still being written."""

COMPRESSED = (".gz", ".tgz")
GUNZIP_BYTES = 4096
"""Decompressed at a time, of which a fault takes the rest with it."""

SCHEMES = ("file", "local", "memory", "s3", "gs", "gcs", "az", "abfs", "abfss", "hf", "http", "https")


CONTAINERS = ("az", "abfs", "abfss")
USER = re.compile(r"[^/?#]*@|[^/?#@]*:(?!\d+(?:[/?#]|$))[^@]*@")
"""User info of a URL after its scheme; a secret key of S3 may hold a slash."""

URL = re.compile(r"""[A-Za-z][A-Za-z0-9+.-]*://[^\s'"<>]+""")

ETAGS = ("ETag", "etag", "md5Hash", "generation", "content_md5", "Content-MD5", "blob_id")
TIMES = ("mtime", "LastModified", "last_modified", "Last-Modified", "updated", "created")
"""What file systems call the version of a file in its entry, the first that is there counts."""

MAX_INFLATION, SMALL_BYTES = 100, 1 << 27
"""A .tar.gz may grow to so many times its length, or to SMALL_BYTES: images hardly shrink; a bomb fills the disk."""


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
    """The URL without user info and query, which may hold secrets; for all that is shown or written.

    Azure writes the container where others have the user: it stays. On an object store `?` alone is a wildcard.
    """
    scheme, separator, rest = url.partition("://")
    if not separator:
        return url
    found = USER.match(rest)
    if found and (scheme not in CONTAINERS or ":" in found[0]):
        rest = rest[found.end() :]
    if scheme in ("http", "https"):
        return f"{scheme}://{re.split('[?#]', rest)[0]}"
    path, _, query = rest.partition("?")
    return f"{scheme}://{path if '=' in query else rest}"


def without_secrets(text: str) -> str:
    """A message of a library, whose URLs are redacted."""
    return URL.sub(lambda match: redacted(match[0]), text)


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


def is_passing(error: Exception) -> bool:
    """Whether an error of a storage call is worth another try: throttling, a reset, a time-out; never a 403 or 404."""
    if isinstance(error, (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)):
        return False
    if isinstance(error, (ConnectionError, TimeoutError)) or getattr(error, "errno", None) in PASSING_ERRORS:
        return True
    foreign = type(error).__module__.partition(".")[0] in NETWORK
    text = f"{type(error).__name__} {error}"
    return bool((foreign or isinstance(error, OSError)) and (PASSING_SIGNS.search(text) or PASSING_CODES.search(text)))


def persistently(call: Callable[[], T], where: str) -> T:
    """Do a storage call in its turn, again after a passing error.

    Args:
        call: what to do; it may be done several times.
        where: path or URL of what it is about: whose turn it is, and for the message.

    Raises:
        PermissionError: refused. That is not throttling, and not tried again.
        OSError: the last error; one of a network package becomes an OSError.
    """
    for attempt in range(1, ATTEMPTS + 1):
        if not where.startswith("memory:"):
            _wait_turn(where)
        try:
            return call()
        except PermissionError as error:
            text = f"{redacted(where)}: access refused (not throttling): {without_secrets(str(error))}"
            raise PermissionError(text) from error
        except Exception as error:
            if not is_passing(error):
                if type(error).__module__.partition(".")[0] not in NETWORK:
                    _name(error, where)
                    raise
                raise OSError(_told(error, where)) from error
            if attempt == ATTEMPTS:
                raise OSError(f"{_told(error, where)}; {ATTEMPTS} tries") from error
            time.sleep(PAUSE_S * 2 ** (attempt - 1) * (0.5 + random.random()))
    raise AssertionError("unreachable")


def _name(error: Exception, where: str) -> None:
    """Have an error say what it is about: a full disk does not."""
    if not isinstance(error, OSError) or error.filename is not None:
        return
    if error.errno is not None:
        error.filename = redacted(where)
    else:
        error.args = (f"{redacted(where)}: {error}",)


def _told(error: Exception, where: str) -> str:
    return f"{redacted(where)}: {type(error).__name__}: {without_secrets(str(error))}"


_turns: dict[str, float] = {}
_turns_lock = threading.Lock()


def _wait_turn(where: str) -> None:
    """A token bucket for each prefix: what it holds is how far the time of its next request lies in the past."""
    prefix = "/".join(where.partition("://")[2].split("/")[:2] if "://" in where else where.strip("/").split("/")[:2])
    with _turns_lock:
        now = time.monotonic()
        turn = max(_turns.get(prefix, 0.0), now - 1.0)
        _turns[prefix] = turn + 1 / REQUESTS_PER_S
    if turn > now:
        time.sleep(turn - now)


def sync_folder(folder: Path) -> None:
    """Make a rename in a local folder outlive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(folder: Path) -> None:
    """Make a local folder and those above it, each of which outlives a power cut."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)


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
        return self._call(path, lambda full: _get(self._fs, full, start, stop))

    def open(self, path: str) -> BinaryIO:
        """A file for reading, seekable; of an object store it is fetched in blocks, as they are asked for."""
        if self._local:
            return open(self._local / path, "rb")
        return self._call(path, lambda full: cast(BinaryIO, self._fs.open(full, "rb")))

    def write(self, path: str, data: bytes | memoryview) -> None:
        """Put a whole file in place of whatever is there."""
        if self._local:
            with self._temporary(self._local / path) as temporary:
                _write_synced(temporary, data)
                os.replace(temporary, self._local / path)
            sync_folder((self._local / path).parent)
        else:
            self._call(path, lambda full: _put(self._fs, full, bytes(data)))

    def create(self, path: str, data: bytes) -> bool:
        """Put a whole file if there is none; False where another is there, or these bytes arrived damaged."""
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
        # An existing file is also the answer to a retry whose first try arrived without its acknowledgement, and what
        # was created may hold other bytes: damaged, or another attempt's by now. So what is there decides.
        with suppress(FileExistsError):
            self._call(path, lambda full: self._fs.pipe_file(full, data, mode="create"))
        return self.read(path) == data

    @contextmanager
    def writing(self, named: Callable[[str], str]) -> Iterator[HashedFile]:
        """Build a large file on local disk; it is published whole when the block ends without an error.

        Args:
            named: the path by the SHA-256 of what was written; its folder is the same for all.
        """
        if self._local:
            with self._temporary(self._local / named("0" * 64)) as temporary:
                with HashedFile(temporary) as file:
                    yield file
                    file.sync()
                target = self._local / named(file.sha256)
                os.replace(temporary, target)
            sync_folder(target.parent)
            return
        with tempfile.TemporaryDirectory() as folder:
            temporary = Path(folder) / "part"
            with HashedFile(temporary) as file:
                yield file
            self._call(named(file.sha256), lambda full: _put(self._fs, full, temporary))

    def bytes(self, path: str) -> int | None:
        """Length of a file, or None where there is none."""
        if self._local:
            target = self._local / path
            return target.stat().st_size if target.is_file() else None
        try:
            return int(self._call(path, lambda full: _info(self._fs, full))["size"])
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
        try:
            listed = self._call(folder, lambda full: self._fs.find(full.rstrip("/"), detail=True))
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
            self._call(path, self._fs.rm_file)
        except FileNotFoundError:
            return

    def sweep(self, folders: Sequence[str]) -> None:
        """Remove what killed processes left half written, here and below some folders; nobody may be writing there."""
        if self._local:
            left = [*self._local.glob(f"{TEMPORARY}*")]
            for folder in folders:
                left += (self._local / folder).rglob(f"{TEMPORARY}*")
            for path in left:
                path.unlink(missing_ok=True)

    @contextmanager
    def _temporary(self, target: Path) -> Iterator[Path]:
        temporary = target.parent / f"{TEMPORARY}{uuid.uuid4().hex}"
        try:
            make_folder(target.parent)
            yield temporary
        except OSError as error:
            _name(error, str(target))
            raise
        finally:
            temporary.unlink(missing_ok=True)

    def _call(self, path: str, call: Callable[[str], T]) -> T:
        """Do a call of the object store on a path of this root."""
        return persistently(lambda: call(f"{self._base}/{path}"), f"{self.url}/{path}")


def versions_of(info: dict[str, Any]) -> list[str]:
    """Whatever an entry says that changes with the file: etags first, then times."""
    values = [info[name] for name in (*ETAGS, *TIMES) if info.get(name) is not None]
    # One of an instant, the other of seconds: `memory` lists a file one way and describes it the other.
    return [str(v.timestamp() if isinstance(v, datetime) else v).strip('"') for v in values]


def etag_of(info: dict[str, Any]) -> str:
    """The etag of an object store's entry, without quotes; empty where there is none."""
    return str(info.get("ETag") or info.get("etag") or "").strip('"')


def _info(fs: Any, path: str) -> dict[str, Any]:
    fs.invalidate_cache()
    return cast("dict[str, Any]", fs.info(path))


def _get(fs: Any, path: str, start: int | None, stop: int | None) -> bytes:
    """One GET, whose length is checked: a connection that breaks may look like the end of the file."""
    data = bytes(fs.cat_file(path, start=start, end=stop))
    first = start or 0
    if stop is None or len(data) != stop - first:
        there = int(_info(fs, path)["size"])
        expected = max(0, (there if stop is None else min(stop, there)) - first)
        if len(data) != expected:
            raise ConnectionError(f"{len(data)} of {expected} bytes arrived")
    return data


def _put(fs: Any, path: str, content: bytes | Path) -> None:
    """One PUT, and a look at what is there now."""
    if isinstance(content, Path):
        fs.put_file(str(content), path)
    else:
        fs.pipe_file(path, content)
    info = _info(fs, path)
    expected = content.stat().st_size if isinstance(content, Path) else len(content)
    if int(info["size"]) != expected:
        raise ConnectionError(f"{info['size']} bytes are there after writing {expected}")
    etag = etag_of(info)
    if MD5.fullmatch(etag):
        data = content.read_bytes() if isinstance(content, Path) else content
        # The etag of an encrypted object looks the same and is something else: only its bytes tell.
        if hashlib.md5(data, usedforsecurity=False).hexdigest() != etag and fs.cat_file(path) != data:
            raise ConnectionError("other bytes are there than were written")


def _write_synced(path: Path, data: bytes | memoryview) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


class HashedFile:
    """A new local file, hashed as it is written: reading it again would cost as much as writing it.

    Attributes:
        bytes: written so far.
    """

    def __init__(self, path: Path) -> None:
        self.bytes = 0
        self._digest = hashlib.sha256()
        self._file = open(path, "wb")  # noqa: SIM115

    def __enter__(self) -> HashedFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    @property
    def sha256(self) -> str:
        """Hex digest of what was written so far."""
        return self._digest.hexdigest()

    def write(self, data: bytes) -> int:
        self.bytes += len(data)
        self._digest.update(data)
        return self._file.write(data)

    def sync(self) -> None:
        """Have it outlive a power cut."""
        self._file.flush()
        os.fsync(self._file.fileno())


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
        fs, path = filesystem(source.url, self._machine.storage_options)
        for number, block in enumerate(self._blocks(role, fs, path, ranges), 1):
            # The last one is held back until it is known that no block was cut from another file than was listed.
            if number == len(ranges):
                _check_same(fs, path, source)
            yield block

    def _blocks(self, role: str, fs: Any, path: str, ranges: Sequence[tuple[int, int]]) -> Iterator[bytes]:
        source = self.unit.sources[role]
        is_local = scheme_of(source.url) in ("file", "local")
        if role in self._open or is_local or source.url.endswith(COMPRESSED):
            with open(self.open(role).path, "rb") as file:
                for start, stop in ranges:
                    file.seek(start)
                    yield file.read(stop - start)
            return
        for start, stop in ranges:
            yield persistently(partial(_get, fs, path, start, min(stop, source.bytes)), source.url)

    def _fetch(self, source: Source) -> LocalFile:
        fs, path = filesystem(source.url, self._machine.storage_options)
        if scheme_of(source.url) in ("file", "local"):
            stored = Path(path)
        else:
            stored = self._scratch() / "stored"
            persistently(lambda: _download(fs, path, stored, source), source.url)
        found = stored.stat().st_size
        if found != source.bytes:
            raise OSError(f"{redacted(source.url)}: {found} bytes, but {source.bytes} when it was listed")
        _check_same(fs, path, source)
        digest = sha256_file(stored) if self._hashing else ""
        if not source.url.endswith(COMPRESSED):
            return LocalFile(str(stored), found, digest)
        plain = self._scratch() / "plain"
        damage = _gunzip(stored, plain)
        # The name decides that it is decompressed, so the same bytes under another name are another file.
        return LocalFile(str(plain), plain.stat().st_size, f"gunzip {digest}" if digest else "", damage)

    def _scratch(self) -> Path:
        return Path(self._cleanup.enter_context(tempfile.TemporaryDirectory(dir=self._machine.scratch)))


def _check_same(fs: Any, path: str, source: Source) -> None:
    """See that a file is the one that was listed.

    Raises:
        OSError: it was replaced since, or is gone.
    """
    if not source.etag:
        return
    if scheme_of(source.url) in ("file", "local"):
        versions = [str(os.stat(path).st_mtime_ns)]
    else:
        fs.invalidate_cache()
        versions = versions_of(persistently(lambda: fs.info(path), source.url))
    if source.etag not in versions:
        raise OSError(f"{redacted(source.url)}: changed since it was listed")


def _download(fs: Any, path: str, stored: Path, source: Source) -> None:
    """Fetch a file whole; twice where its etag may be its MD5 and is not, until two tries agree."""
    fs.get_file(path, str(stored))
    if stored.stat().st_size < source.bytes:
        raise ConnectionError(f"{stored.stat().st_size} of {source.bytes} bytes arrived")
    if MD5.fullmatch(source.etag):
        with open(stored, "rb") as file:
            first = digest_of(file, "md5")
        if first != source.etag:
            fs.get_file(path, str(stored))
            with open(stored, "rb") as file:
                if digest_of(file, "md5") not in (first, source.etag):
                    raise ConnectionError("two tries gave different bytes")


def sha256_file(path: Path) -> str:
    """Hex digest of a local file, read in blocks."""
    with open(path, "rb") as file:
        return sha256_of(file)


def sha256_of(file: BinaryIO) -> str:
    """Hex digest of an open file, read in blocks."""
    return digest_of(file, "sha256")


def digest_of(file: BinaryIO, name: Literal["md5", "sha256"]) -> str:
    """The same for an algorithm of hashlib; MD5 only to compare with what a store tells."""
    digest = hashlib.new(name, usedforsecurity=False)
    while block := file.read(BLOCK_BYTES):
        digest.update(block)
    return digest.hexdigest()


def _gunzip(stored: Path, plain: Path) -> str | None:
    """Decompress as far as the bytes allow, and as a pool of images may grow; what went wrong, or None."""
    most = max(SMALL_BYTES, MAX_INFLATION * stored.stat().st_size)
    with open(plain, "wb") as out:
        try:
            with gzip.open(stored, "rb") as file:
                # By `read1`, which gives what there is before it meets a fault; `read` would throw it away.
                while block := file.read1(GUNZIP_BYTES):
                    if out.tell() + len(block) > most:
                        return f"grows to more than {most} bytes"
                    out.write(block)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            return str(error)
    return None
