"""Packages that an extra of this one brings."""

from __future__ import annotations

import importlib.util
import sys


def missing(package: str, extra: str) -> str | None:
    """None if ``package`` is installed, else what to do; nothing is imported."""
    found = package in sys.modules
    if not found:
        try:
            found = importlib.util.find_spec(package) is not None
        except (ImportError, ValueError):  # an import hook that forbids it, or half a package
            found = False
    return None if found else f"{package} is not installed: pip install 'hici-kernels[{extra}]'"
