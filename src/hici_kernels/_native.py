"""The native library: found, loaded on first use, and explained where it is missing.

It holds the C++ kernels behind apache-tvm-ffi and knows neither torch nor Python versions. Nothing here is imported or
loaded before a native kernel is asked for.
"""

from __future__ import annotations

import functools
import importlib.util
import platform
from pathlib import Path
from typing import Any

import torch

PATH = Path(__file__).with_name("libhici_native.so")
COST = "CPU tensors are served by the slower PyTorch reference"


@functools.cache
def library() -> Any:
    """The loaded library; its attributes are the exported functions, which take tensors.

    Raises:
        ImportError: with the sentence of :func:`status`.
    """
    reason = _missing()
    if reason is None:
        try:
            import tvm_ffi

            return tvm_ffi.load_module(str(PATH))
        except (ImportError, OSError, RuntimeError) as error:
            reason = f"The native library does not load here ({_first_line(error)}): {COST}."
    raise ImportError(reason)


@functools.cache
def status() -> str | None:
    """None if the native library is usable, else one sentence: what is missing and what that costs."""
    try:
        library()
    except ImportError as error:
        return str(error)
    return None


def _missing() -> str | None:
    if not PATH.is_file():
        return (
            f"The native library was not built when this package was installed: {COST} until it is reinstalled "
            "where a C++17 compiler and CMake are found."
        )
    if importlib.util.find_spec("tvm_ffi") is None:
        return f"The native library needs the package apache-tvm-ffi, which is not installed: {COST}."
    if platform.machine() in ("x86_64", "AMD64") and torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        return f"The native library needs a CPU with AVX2, which this one lacks: {COST}."
    return None


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
