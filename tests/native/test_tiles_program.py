"""`make tiles` is run by hand: that its program still fits the kernels is checked by the compiler alone."""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMPILER = shutil.which("c++") or shutil.which("g++")
DEFINITIONS = [
    "-DHICI_HAVE_AMX",
    "-DHICI_PATH=amx",
    "-DHICI_PATH_AVX512",
    "-DHICI_PATH_AVX512_BF16",
    "-DHICI_PATH_AMX",
    "-DHICI_TILES_ONLY_MOVE",
]
FLAGS = ["-std=c++17", "-fsyntax-only", "-march=x86-64-v4", "-mavx512bf16", "-mamx-tile", "-mamx-bf16"]


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="tiles are registers of x86-64")
@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler here")
@pytest.mark.parametrize("stay", [[], ["-DHICI_TILES_STAY"]], ids=["moving", "still"])
@pytest.mark.parametrize(
    "source",
    [
        "benchmarks/tiles/main.cpp",
        "csrc/cpu/kernels/attention_forward.cpp",
        "csrc/cpu/kernels/attention_backward.cpp",
    ],
)
def test_tiles_program_compiles(source, stay):
    command = [COMPILER, *FLAGS, *DEFINITIONS, *stay, f"-I{ROOT}/csrc", f"-I{ROOT}/csrc/include", str(ROOT / source)]
    known = subprocess.run([COMPILER, *FLAGS, "-x", "c++", "/dev/null"], capture_output=True)
    if known.returncode != 0:
        pytest.skip("this compiler knows no tiles")
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
