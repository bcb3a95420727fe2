"""Where and how fast: everything about a computation that never changes what it means.

In: a YAML file such as conf/machines/laptop.yaml. Out: a frozen Machine. No field of it reaches a key, but for the
numerics class that a worker reports for itself (embed.py).
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from pipeline.config import load_yaml, validate

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Of glibc's malloc.h."""

HEAP_BLOCK_BYTES, KEPT_BYTES = 256 << 20, 1 << 30
"""The largest block that is kept, and how much of them: more than the layers of a network hold together for a batch."""

BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}
"""Flags in /proc/cpuinfo of processors that multiply bfloat16 faster than float32; the last is ARM's."""

Price = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Prices(BaseModel):
    """What the machine costs, for `plan` and the report. What costs nothing is 0."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    currency: str
    cpu_core_hour: Price
    gpu_hour: Price
    storage_gb_month: Price
    egress_gb: Price
    """Of what is read from the pool: 0 inside its region."""
    per_million_requests: Price


class Rates(BaseModel):
    """How fast a GPU embeds, for `plan` on a host that has none of the kind."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str
    """Who measured it, on what."""
    images_per_s: dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]]
    """Images and their captions a second through both towers on one GPU, by open_clip's name of the architecture."""


class Machine(BaseModel):
    """One kind of machine; a cluster is many of the same."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "float32", "bf16", "fp16"] = "auto"
    """Of the forward pass. auto: bf16 on a GPU and on processors that have it, else float32."""
    threads: Annotated[int, Field(ge=1)] = 1
    """Threads of one worker's numeric kernels. The same for serial and Ray, so that both give the same bytes."""
    workers: Annotated[int, Field(ge=1)] | None = None
    """CPU workers on a Ray cluster; null: one for each `threads` cores that the cluster has."""
    gpus: Annotated[int, Field(ge=0)] | None = None
    """GPU workers on a Ray cluster, one GPU each; null: all that it has. 0: embed on the CPU workers."""
    decoders: Annotated[int, Field(ge=0)] = 0
    """Threads that decode images beside one embedding worker; 0 decodes in line."""
    image_batch: Annotated[int, Field(ge=1)] = 64
    text_batch: Annotated[int, Field(ge=1)] = 256
    fast_decode: bool = False
    """Scaled JPEG decode, and images cut before they are resized: faster, and farther from the pixels of open_clip's
    own transform, which are met to within one level otherwise. Belongs to the embeddings' key."""
    unit_deadline_s: Annotated[float, Field(gt=0)] = 3600.0
    """A unit that takes longer is killed and tried once more elsewhere, then named."""
    storage_options: Annotated[dict[str, dict[str, Any]], Field(repr=False)] = {}
    """fsspec options by protocol, for example {s3: {endpoint_url: ...}}. Secrets belong into the environment."""
    scratch: str | None = None
    """Folder for downloads and spills; null: the system's temporary folder."""
    prices: Prices | None = None
    """For `plan` and the report; null: no money is named."""
    rates: Rates | None = None
    """For `plan`, of GPUs that are not where it runs."""

    def __hash__(self) -> int:
        return hash(self.model_dump_json())


def load_machine(path: str | None) -> Machine:
    """Read a machine file, or describe this machine where there is none.

    Raises:
        UserError: the file is missing, is not YAML, or has an unknown key or a wrong value; the message names it.
    """
    if path is None:
        return Machine(threads=max(1, (os.cpu_count() or 1)))
    return validate(Machine, load_yaml(Path(path)), "machine")


@functools.cache
def bf16_flags() -> tuple[str, ...]:
    """Those of this processor's features that are in BF16_FLAGS, sorted; none are known but on Linux."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ()
    flags = {flag for line in lines if line.lower().startswith(("flags", "features")) for flag in line.split()}
    return tuple(sorted(flags & BF16_FLAGS))


def keep_freed_memory() -> None:
    """Tell glibc to keep up to KEPT_BYTES that this process freed, in blocks of up to HEAP_BLOCK_BYTES.

    It would give the large ones back, and zero their pages anew for every layer of a network and every block of rows: a
    quarter of the time of a convolutional tower on a processor, and some 3% of an assignment to clusters. With all that
    a batch needs it does so, too, if that is more than KEPT_BYTES and nothing in use happens to lie behind it.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, HEAP_BLOCK_BYTES)
        libc.mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
