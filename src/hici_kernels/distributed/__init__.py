"""Long sequences over several processes: segments of HiCI over ranks, kv heads of HGA over ranks. Needs torch alone."""

from .context_parallel import (
    ContextParallel,
    apply_context_parallel,
    fsdp_sums_gradients,
    remove_context_parallel,
    scalar_parameters,
)
from .kv_heads import HeadShard, ShardedHGAAttention, shard_hga
from .plan import ShardPlan
from .traffic import Traffic, layer_traffic, ring_traffic, traffic_table

__all__ = [
    "ContextParallel",
    "HeadShard",
    "ShardPlan",
    "ShardedHGAAttention",
    "Traffic",
    "apply_context_parallel",
    "fsdp_sums_gradients",
    "layer_traffic",
    "remove_context_parallel",
    "ring_traffic",
    "scalar_parameters",
    "shard_hga",
    "traffic_table",
]
