"""PEP 517 backend: setuptools, plus the cmake and ninja wheels where the machine has a compiler but not these tools."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403

OLDEST_CMAKE = (3, 19)


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    return build_meta.get_requires_for_build_wheel(config_settings) + _tools()


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    return build_meta.get_requires_for_build_editable(config_settings) + _tools()


def _tools() -> list[str]:
    named = shlex.split(os.environ.get("CXX", ""))[:1]
    if not any(shutil.which(name) for name in named or ("c++", "g++", "clang++")):
        return []  # nothing to build with: the package installs without its native library
    wanted = [] if _cmake_version() >= OLDEST_CMAKE else ["cmake>=3.19"]
    if not shutil.which("ninja") and not shutil.which("make"):
        wanted.append("ninja")
    return wanted


def _cmake_version() -> tuple[int, ...]:
    try:
        answer = subprocess.run(["cmake", "--version"], text=True, capture_output=True).stdout
    except OSError:
        return ()
    found = re.search(r"(\d+)\.(\d+)", answer)
    return tuple(map(int, found.groups())) if found else ()
