"""doctor refuses what is known to be vulnerable, and is loud where a GPU is there but not used."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.doctor import FAISS, NEEDED, SAFE, Facts, Finding, facts, findings, outdated, release
from pipeline.machine import Machine

GOOD = {**SAFE, **dict.fromkeys(NEEDED, "1.0"), "faiss-cpu": "1.9", "pairsieve": "0.1"}
FIT = Facts(GOOD, "3.11.7", False, "cpu", "bf16", "cpu avx512 torch 2.6", None, False, None, True, True, 2)


def of(found: Facts, machine: Machine | None = None) -> dict[str, Finding]:
    return {finding.what: finding for finding in findings(found, machine or Machine())}


def levels(found: Facts, machine: Machine | None = None) -> dict[str, str]:
    return {what: finding.level for what, finding in of(found, machine).items() if finding.level != "ok"}


@pytest.mark.goal("S-h")
def test_the_first_safe_versions_are_accepted() -> None:
    assert outdated(SAFE) == []
    assert outdated({"ray": "2.60.0", "pyarrow": "26.0.1", "pillow": "13.0.0", "torch": "2.14.1+cu124"}) == []


@pytest.mark.goal("S-h")
@pytest.mark.parametrize(
    ("package", "version"), [("ray", "2.55.9"), ("pyarrow", "23.0.1"), ("pillow", "12.2.0"), ("torch", "2.5.1+cpu")]
)
def test_a_version_with_known_holes_is_refused_by_name(
    package: str, version: str, record_property: pytest.RecordProperty
) -> None:
    (fault,) = outdated({**SAFE, package: version})
    detail = f"{version} has known vulnerabilities; {SAFE[package]} is the first without"
    assert fault == Finding("fault", package, detail)
    record_property("figure", f"{package} {version}: refused, {SAFE[package]} is not")


@pytest.mark.goal("S-h")
def test_every_missing_package_is_named() -> None:
    assert [fault.what for fault in outdated({})] == ["ray", "pyarrow", "pillow", "torch"]
    assert levels(replace(FIT, versions={**GOOD, "polars": None})) == {"polars": "fault"}


def test_versions_are_compared_as_numbers() -> None:
    assert release("2.10.0+cu124") == (2, 10, 0)
    assert release("2.10") > release("2.6")
    assert release("12.3.0.dev1") == (12, 3, 0)
    assert release("unknown") == ()


def test_a_fit_machine_has_nothing_but_good_findings() -> None:
    assert levels(FIT) == {}
    assert of(FIT)["device"].detail == "cpu, bf16, cpu avx512 torch 2.6"
    assert of(FIT)["faiss"].detail == "faiss-cpu 1.9, CPU build"
    assert of(FIT)["threads"].detail == "1 of one worker; 2 cores"


def test_extras_that_are_missing_are_no_fault_and_say_how_to_get_them() -> None:
    assert of(replace(FIT, versions={**GOOD, "s3fs": None}))["s3fs"].detail.endswith("pip install 'pairsieve[s3]'")


def test_a_gpu_that_torch_does_not_use_is_a_fault_unless_the_cpu_was_asked_for() -> None:
    seen = replace(FIT, gpu_seen=True)
    assert levels(seen) == {"device": "fault"}
    assert "everything would be embedded on the CPU" in of(seen)["device"].detail
    assert levels(seen, Machine(device="cpu")) == {}


def test_a_machine_file_that_cannot_be_honoured_is_a_fault() -> None:
    refused = replace(FIT, refused="machine.device: cuda is demanded, but torch finds no GPU on this host")
    assert of(refused)["device"] == Finding("fault", "device", refused.refused or "")


def test_a_gpu_without_faiss_for_it_is_a_warning() -> None:
    gpu = replace(FIT, gpu_seen=True, device="cuda", kind="NVIDIA H100 torch 2.6")
    assert levels(gpu) == {"faiss": "warning"}
    assert "pip install 'pairsieve[gpu]' && pip uninstall" in of(gpu)["faiss"].detail
    fit = replace(gpu, versions={**GOOD, "faiss-cpu": None, FAISS[0]: "1.9"}, faiss_gpu=True)
    assert of(fit)["faiss"] == Finding("ok", "faiss", "faiss-gpu-cu12 1.9, GPU build")


def test_two_builds_of_faiss_are_doubtful_or_a_fault_and_it_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = replace(FIT, versions={**GOOD, FAISS[0]: "1.14"}, faiss_error="module 'faiss._swigfaiss' has no attribute")
    assert levels(broken) == {"faiss": "fault"}
    assert of(broken)["faiss"].detail == (
        "faiss-gpu-cu12 1.14 and faiss-cpu 1.9: cannot be imported: module 'faiss._swigfaiss' has no attribute; only "
        "one may stay: pip uninstall --yes faiss-cpu && pip install --force-reinstall --no-deps faiss-gpu-cu12"
    )
    overwritten = replace(broken, faiss_error=None)
    assert levels(overwritten) == {"faiss": "warning"}
    assert of(overwritten)["faiss"].detail.startswith("faiss-gpu-cu12 1.14 and faiss-cpu 1.9, CPU build; only one may")
    assert "only one" not in of(replace(FIT, faiss_error="libcublas.so.12: no such file"))["faiss"].detail
    # What an import of both ends in.
    (tmp_path / "faiss.py").write_text("import sys\nsys.missing_from_the_other_build\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "faiss", raising=False)
    found = facts(Machine(device="cpu"))
    assert found.faiss_error == "module 'sys' has no attribute 'missing_from_the_other_build'"
    assert not found.faiss_gpu


def test_slow_jpeg_and_missing_fribidi_are_warnings() -> None:
    assert levels(replace(FIT, fast_jpeg=False, raqm=False)) == {"jpeg": "warning", "raqm": "warning"}


def test_this_machine_can_be_looked_at() -> None:
    found = facts(Machine(device="cpu"))
    assert found.device == "cpu"
    assert found.versions["ray"]
    assert found.cores >= 1
    assert facts(Machine(device="cpu", precision="fp16")).refused is not None
