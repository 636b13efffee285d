"""Hierarchical long-context attention: HiCI and HGA.

Importing this package needs torch only. ``import hici`` gives the same module.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as _version

from . import kv, nn, ops
from .config import HGAConfig, HiCIConfig
from .errors import ImplError, KVStoreError
from .kv import KVStore
from .ops import (
    attention,
    global_stats,
    hga_attention,
    hga_route,
    hga_summaries,
    local_slots,
    merge_attention,
)
from .rope import Rope

try:
    __version__ = _version("hici-kernels")
except PackageNotFoundError:  # imported from a source tree that was never installed
    __version__ = "0+unknown"

__all__ = [
    "HGAConfig",
    "HiCIConfig",
    "ImplError",
    "KVStore",
    "KVStoreError",
    "Rope",
    "attention",
    "global_stats",
    "hga_attention",
    "hga_route",
    "hga_summaries",
    "kv",
    "local_slots",
    "merge_attention",
    "nn",
    "ops",
]
