"""Names of GPU architectures, and what of them bounds a configuration."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from contextvars import ContextVar

import torch

# Bytes of shared memory (LDS) one block can use: CUDA programming guide, "shared memory per thread block" of each
# compute capability; CDNA and RDNA instruction-set manuals.
SHARED_MEMORY = {
    "sm_80": 166912,
    "sm_86": 101376,
    "sm_87": 166912,
    "sm_89": 101376,
    "sm_90": 232448,
    "sm_100": 232448,
    "sm_103": 232448,
    "sm_120": 101376,
    "sm_121": 101376,
    "gfx90a": 65536,
    "gfx942": 65536,
    "gfx950": 163840,
    "gfx1100": 65536,
    "gfx1200": 65536,
    "gfx1201": 65536,
}

# A chip that is not listed gets what every one of its vendor's chips since 2018 has.
LEAST_SHARED_MEMORY = 65536

INTERPRET = "interpret"


def vendor(arch: str) -> str:
    """ "nvidia", "amd" or "interpret"; ValueError for anything else."""
    if arch == INTERPRET:
        return INTERPRET
    for prefix, name in (("sm_", "nvidia"), ("gfx", "amd")):
        if isinstance(arch, str) and arch.startswith(prefix) and arch[len(prefix) :]:
            return name
    raise ValueError(f"arch must be 'interpret' or like 'sm_90' or 'gfx942', got {arch!r}")


def generation(arch: str) -> int:
    """Orders the chips of one vendor by age."""
    digits = arch.removeprefix("sm_").removeprefix("gfx").rstrip("af") if vendor(arch) == "nvidia" else arch[3:]
    try:
        return int(digits) if vendor(arch) == "nvidia" else int(digits, 16)
    except ValueError:
        return 0


def shared_memory(arch: str) -> int:
    """Bytes of shared memory one block can use; unbounded for the interpreter."""
    if vendor(arch) == INTERPRET:
        return 1 << 62
    return SHARED_MEMORY.get(arch, LEAST_SHARED_MEMORY)


# What :func:`pretend` makes every device, in its own context only.
_PRETENDED: ContextVar[str | None] = ContextVar("pretended", default=None)


@contextlib.contextmanager
def pretend(arch: str) -> Iterator[None]:
    """Within it, and on this thread only, every device is of this architecture: for compiling without one."""
    token = _PRETENDED.set(arch)
    try:
        yield
    finally:
        _PRETENDED.reset(token)


# Of a pretended device: about what chips of the tables have.
PRETENDED_MULTIPROCESSORS = 128


def multiprocessors(device: torch.device) -> int:
    """How many blocks a device runs at the same time, at least; 1 for the interpreter."""
    if _PRETENDED.get() is not None:
        return PRETENDED_MULTIPROCESSORS
    return _multiprocessors_of_gpu(device.index) if device.type == "cuda" else 1


def architecture(device: torch.device) -> str:
    """The name a table knows a device by; a CPU tensor can only meet a kernel in Triton's interpreter."""
    pretended = _PRETENDED.get()
    if pretended is not None:
        return pretended
    if device.type != "cuda":
        return INTERPRET
    return _of_gpu(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _multiprocessors_of_gpu(index: int | None) -> int:
    return int(torch.cuda.get_device_properties(index).multi_processor_count)


@functools.cache
def _of_gpu(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"
