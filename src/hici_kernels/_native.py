"""The native library: found, loaded on first use, and explained where it is missing.

It holds the C++ kernels behind apache-tvm-ffi and knows neither torch nor Python versions. Nothing here is imported or
loaded before a native kernel is asked for.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib.util
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

PATH = Path(__file__).with_name("libhici_native.so")
FASTEST = -1
_forced = contextvars.ContextVar("hici_native_path", default=(FASTEST, True))

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


@functools.cache
def paths() -> dict[str, int]:
    """Instruction-set paths of the kernels that this processor runs, slowest first: name -> number.

    "base" is AVX2 on x86-64; "avx512"; "avx512_bf16" (bfloat16 products), before "avx512" on Intel processors whose
    bfloat16 products are slower than those of float32; "amx" (bfloat16 tiles). Empty where the library is not usable.
    """
    if status() is not None:
        return {}
    pairs = (str(entry).split() for entry in library().cpu_paths())
    return {name: int(number) for number, name in pairs}


@contextlib.contextmanager
def path(name: str, *, direct: bool = True) -> Iterator[None]:
    """Serve the calls inside by one named path instead of the fastest.

    Args:
        name: one of :func:`paths`.
        direct: False = small calls too take the kernels of large ones, instead of being computed directly in float64.

    Raises:
        ValueError: if this processor does not run it.
    """
    if name not in paths():
        raise ValueError(f"name must be one of {', '.join(map(repr, paths())) or 'none on this machine'}, got {name!r}")
    token = _forced.set((paths()[name], direct))
    try:
        yield
    finally:
        _forced.reset(token)


def execution() -> tuple[int, int]:
    """(path, threads): the last two arguments of native operations. Results never depend on the number of threads;
    a negative one says that no call is computed directly."""
    number, direct = _forced.get()
    return number, torch.get_num_threads() if direct else -torch.get_num_threads()


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
