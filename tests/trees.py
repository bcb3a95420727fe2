"""What two equal runs have to agree on: every file of the run directory but times.json and the report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


def comparable(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """The files of a run directory that have to be equal, of all; the checksums without the report's."""
    kept = {}
    for name, data in files.items():
        if name == "checksums.sha256":
            data = b"".join(line for line in data.splitlines(keepends=True) if b"  report/" not in line)
        if not name.startswith(("store/", "report/")) and name != "times.json":
            kept[name] = data
    return kept


def tree(directory: Path) -> dict[str, bytes]:
    """The same of a local run directory."""
    files = (path for path in sorted(directory.rglob("*")) if path.is_file() and "store" not in path.parts)
    return comparable({path.relative_to(directory).as_posix(): path.read_bytes() for path in files})
