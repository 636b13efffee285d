"""Hierarchical long-context attention: HiCI and HGA.

Importing this package needs torch only. ``import hici`` gives the same module.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as _version
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from .integrations import apply_hga as apply_hga
    from .integrations import apply_hici as apply_hici
    from .integrations import load_hici as load_hici
    from .integrations import merge_hici as merge_hici
    from .integrations import restore as restore
    from .integrations import save_hici as save_hici

# what needs transformers, which is imported when one of these is asked for
_MODELS = ("apply_hga", "apply_hici", "load_hici", "merge_hici", "restore", "save_hici")


if not TYPE_CHECKING:  # a type checker would take any name for one of these

    def __getattr__(name: str) -> Any:
        if name in _MODELS:
            from . import integrations

            return getattr(integrations, name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


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
