"""Whether this machine is fit: versions, device, precision, extras. In: what is installed. Out: findings, as values."""

from __future__ import annotations

import os
import platform
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from pipeline.errors import UserError
from pipeline.machine import Machine

SAFE = {"ray": "2.56", "pyarrow": "24", "pillow": "12.3", "torch": "2.6"}
"""Package -> first version without a known hole that input can reach (CVE-2026-57516 and others of Ray, CVE-2026-25087
of Arrow, CVE-2026-55798 of Pillow, and torch.load before 2.6)."""

NEEDED = ("numpy", "open_clip_torch", "fsspec", "polars", "pydantic", "safetensors", "simplejpeg", "webdataset")
EXTRAS = {
    "s3fs": "S3 needs pip install 'pairsieve[s3]'",
    "gcsfs": "GCS needs pip install 'pairsieve[gcs]'",
    "cld3-py": "a language detector needs pip install 'pairsieve[language]'",
    "emoji": "`pairsieve sample` needs pip install 'pairsieve[sample]'",
}
FAISS = ("faiss-gpu-cu12", "faiss-gpu-cu11", "faiss-gpu", "faiss-cpu")
ONE_FAISS = "pip uninstall --yes faiss-cpu && pip install --force-reinstall --no-deps faiss-gpu-cu12"
"""Leaves the GPU build alone in the folder that both share; the other is there because pairsieve depends on it."""

Level = Literal["ok", "warning", "fault"]


@dataclass(frozen=True)
class Finding:
    """One line of the answer; a fault makes `doctor` fail."""

    level: Level
    what: str
    detail: str


@dataclass(frozen=True)
class Facts:
    """What this machine is.

    Attributes:
        versions: package -> version, None where it is not installed.
        python: its version.
        gpu_seen: whether the driver's device files or nvidia-smi are there.
        device, precision, kind: what forward passes are computed with; `kind` names processor or GPU.
        refused: why the machine file cannot be honoured, or None.
        faiss_gpu: whether the FAISS that is imported has its GPU part.
        faiss_error: why there is none to import, or None.
        fast_jpeg: whether Pillow decodes with libjpeg-turbo, as simplejpeg always does.
        raqm: whether Pillow can lay out emoji (libraqm with libfribidi).
        cores: of this process.
    """

    versions: Mapping[str, str | None]
    python: str
    gpu_seen: bool
    device: str
    precision: str
    kind: str
    refused: str | None
    faiss_gpu: bool
    faiss_error: str | None
    fast_jpeg: bool
    raqm: bool
    cores: int


def outdated(versions: Mapping[str, str | None]) -> list[Finding]:
    """Every package that is missing or older than SAFE allows, as a fault.

    Args:
        versions: package -> version, None or absent where it is not installed.
    """
    faults = []
    for package, least in SAFE.items():
        version = versions.get(package)
        if version is None:
            faults.append(Finding("fault", package, f"not installed; {least} or newer is needed"))
        elif release(version) < release(least):
            faults.append(
                Finding("fault", package, f"{version} has known vulnerabilities; {least} is the first without")
            )
    return faults


def release(version: str) -> tuple[int, ...]:
    """The release numbers of a version: 2.6.0+cu124 -> (2, 6, 0)."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(number) for number in match[0].split(".")) if match else ()


def findings(facts: Facts, machine: Machine) -> Iterator[Finding]:
    """What is good, doubtful and wrong about a machine.

    Args:
        facts: what is there.
        machine: what is expected of it.
    """
    yield Finding("ok", "pairsieve", f"{facts.versions.get('pairsieve') or 'not installed'}, Python {facts.python}")
    faults = outdated(facts.versions)
    yield from faults
    wrong = {fault.what for fault in faults}
    for package, version in facts.versions.items():
        if package in SAFE and package not in wrong:
            yield Finding("ok", package, str(version))
        elif package in NEEDED:
            yield Finding("ok" if version else "fault", package, version or "not installed")
        elif package in EXTRAS:
            yield Finding("ok", package, version or f"not installed; {EXTRAS[package]}")
    if facts.refused:
        yield Finding("fault", "device", facts.refused)
    elif facts.gpu_seen and facts.device == "cpu" and machine.device != "cpu":
        detail = "this host has a GPU, but torch cannot use it: everything would be embedded on the CPU"
        yield Finding("fault", "device", f"{detail} (install a CUDA build of torch, or say `device: cpu`)")
    else:
        yield Finding("ok", "device", f"{facts.device}, {facts.precision}, {facts.kind}")
    yield _faiss(facts)
    yield Finding("ok", "threads", f"{machine.threads} of one worker; {facts.cores} cores")
    if not facts.fast_jpeg:
        yield Finding(
            "warning", "jpeg", "Pillow without libjpeg-turbo decodes grey and CMYK JPEGs several times slower"
        )
    if not facts.raqm:
        yield Finding("warning", "raqm", "libfribidi is missing: `pairsieve sample` draws no joined emoji")


def _faiss(facts: Facts) -> Finding:
    installed = [f"{name} {facts.versions[name]}" for name in FAISS if facts.versions.get(name)]
    found = " and ".join(installed) or "of no package"
    several = f"; only one may stay: {ONE_FAISS}" if len(installed) > 1 else ""
    if facts.faiss_error:
        return Finding("fault", "faiss", f"{found}: cannot be imported: {facts.faiss_error}{several}")
    build = f"{found}, {'GPU' if facts.faiss_gpu else 'CPU'} build"
    if facts.device == "cuda" and not facts.faiss_gpu and not several:
        hint = f"k-means of many clusters is slow without pip install 'pairsieve[gpu]' && {ONE_FAISS}"
        return Finding("warning", "faiss", f"{build}; {hint}")
    return Finding("warning" if several else "ok", "faiss", build + several)


def facts(machine: Machine) -> Facts:
    """Look at this machine."""
    from PIL import features

    from pipeline.encode import numerics

    packages = ("pairsieve", *SAFE, *NEEDED, *EXTRAS, *FAISS)
    versions = {package: _version(package) for package in packages}
    faiss_gpu, faiss_error = False, None
    try:
        import faiss

        faiss_gpu = hasattr(faiss, "StandardGpuResources")
    except (ImportError, AttributeError) as error:
        faiss_error = str(error)
    device, precision, kind, refused = "cpu", "none", "", None
    try:
        found = numerics(machine)
        device, precision, kind = found.device, found.precision, found.kind
    except UserError as error:
        refused = str(error)
    return Facts(
        versions=versions,
        python=platform.python_version(),
        gpu_seen=shutil.which("nvidia-smi") is not None or any(Path("/dev").glob("nvidia[0-9]*")),
        device=device,
        precision=precision,
        kind=kind,
        refused=refused,
        faiss_gpu=faiss_gpu,
        faiss_error=faiss_error,
        fast_jpeg=bool(features.check_feature("libjpeg_turbo")),
        raqm=bool(features.check_feature("raqm")) and bool(features.check_feature("fribidi")),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
    )


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
