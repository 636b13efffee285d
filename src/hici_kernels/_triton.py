"""Triton, the optional package: whether its kernels can run here. Imports it only where they might."""

from __future__ import annotations

import os
import sys

import torch
from torch import Tensor

from ._optional import missing
from .tuning.chips import architecture, generation, vendor

# Older GPUs have no products of bfloat16 and no asynchronous copies, and no kernel is compiled for them ahead of time.
OLDEST = 80


def interpreted() -> bool:
    """Whether Triton's interpreter is on, for the whole process: TRITON_INTERPRET=1 when Triton is imported."""
    if "triton" not in sys.modules and not os.environ.get("TRITON_INTERPRET"):
        return False  # the import takes half a second, and it would find the same
    import triton

    return bool(triton.knobs.runtime.interpret)


def unavailable() -> str | None:
    """Why no kernel of any operation can run in this process, or None."""
    absent = missing("triton", "triton")
    if absent:
        return absent
    try:
        if interpreted() or torch.cuda.is_available():
            import triton  # noqa: F401

            return None
    except Exception as error:  # a Triton built for another Python or driver
        return f"triton does not import: {error}"
    return "there is no GPU (TRITON_INTERPRET=1 runs the kernels in Triton's interpreter, for tests)"


def too_old(device: torch.device) -> str | None:
    """Why no kernel serves this GPU, or None."""
    arch = architecture(device)
    if vendor(arch) == "nvidia" and generation(arch) < OLDEST:
        return f"it serves NVIDIA GPUs from sm_{OLDEST} (Ampere) on, {device} is of {arch}"
    return None


def rejects_device(name: str, x: Tensor, interpreter: bool) -> str | None:
    """Why kernels compiled (or, ``interpreter``, interpreted) cannot read argument ``name``, or None."""
    old = too_old(x.device)
    if old is not None:
        return old
    if x.device.type == "cuda" or (x.device.type == "cpu" and interpreter):
        return None
    if x.device.type == "cpu":
        return f"it serves GPU tensors (CPU tensors in Triton's interpreter, TRITON_INTERPRET=1), {name} is on cpu"
    return f"it serves GPU tensors, {name} is on {x.device}"
