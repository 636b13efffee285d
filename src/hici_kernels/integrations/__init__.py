"""Models of the transformers library with HiCI or HGA attention. Importing this needs the extra ``[transformers]``."""

from . import versions

versions.check()

from .dca import DCAConfig, apply_dca  # noqa: E402
from .hga import apply_hga  # noqa: E402
from .hga_cache import HGACache  # noqa: E402
from .hici import apply_hici  # noqa: E402
from .host import restore  # noqa: E402
from .load import load_hici  # noqa: E402
from .rope_scaling import apply_rope_scaling  # noqa: E402
from .save import merge_hici, save_hici  # noqa: E402
from .shifted import apply_shifted  # noqa: E402

__all__ = [
    "DCAConfig",
    "HGACache",
    "apply_dca",
    "apply_hga",
    "apply_hici",
    "apply_rope_scaling",
    "apply_shifted",
    "load_hici",
    "merge_hici",
    "restore",
    "save_hici",
]
