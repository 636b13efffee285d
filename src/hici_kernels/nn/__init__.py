"""Drop-in modules with the published state-dict keys."""

from .global_integrator import GlobalIntegrator
from .hga_attention import HGAAttention
from .hici_attention import HiCIAttention
from .hici_cache import HiCICache, SegmentCache, TokenCache
from .local_constructor import LocalConstructor
from .norm import RMSNorm

__all__ = [
    "GlobalIntegrator",
    "HGAAttention",
    "HiCIAttention",
    "HiCICache",
    "LocalConstructor",
    "RMSNorm",
    "SegmentCache",
    "TokenCache",
]
