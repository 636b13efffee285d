"""attention: what to compile ahead of time of the forward kernels."""

from __future__ import annotations

from typing import Any

import torch

from ...tuning import TRITON_TYPES, AotSignature, Entry
from .triton import column_blocks, fitted
from .triton_forward import SIZES, attention_forward, merge_blocks, merge_splits
from .triton_schedule import BLOCK_DOCUMENTS, BLOCK_TILES, place_tiles


def aot_signatures(entry: Entry) -> list[AotSignature]:
    """Training without masks, everything at once, and one decoded token with its keys cut into runs."""
    if entry.op != "attention":
        return []
    block_d, block_e = column_blocks(entry.head_dim, getattr(torch, entry.dtype))
    pointer = "*" + TRITON_TYPES[entry.dtype]
    floats = ("q", "k", "v", "global_k", "global_v", "local_k", "local_v", "out")
    masks = {"prefix_mask": "*u8", "attention_mask": "*u8"}
    strides = tuple(n for n in attention_forward.arg_names if n.startswith("stride_"))
    common = {
        **dict.fromkeys(floats, pointer),
        "lse": "*fp32",
        "scale": "fp32",
        "factor": "fp32",
        **dict.fromkeys((*strides, *SIZES), "i32"),
    }
    # strides of masks are 1 or any number; those of the rest are whole rows
    aligned = (*floats, "lse", *(n for n in strides if n[7] not in "pm"))
    constants = {
        "HEAD_DIM": entry.head_dim,
        "BLOCK_D": block_d,
        "BLOCK_E": block_e,
        "CAUSAL": True,
        "FUSED": entry.dtype != "float32",
        "SIGN": 1,
    }

    def variant(
        name: str, arguments: dict[str, str], constexprs: dict[str, Any], configuration: dict[str, int]
    ) -> AotSignature:
        chosen = {k: v for k, v in configuration.items() if k in entry.constexprs and k != "TMA"}
        return AotSignature(
            kernel=attention_forward,
            variant=name,
            arguments=arguments,
            constexprs={**constants, **constexprs, **chosen},
            divisible=aligned,
            options={"num_warps": configuration["num_warps"]},
        )

    no_tma = {"k_descriptor": None, "v_descriptor": None}
    absent = {"prefix_mask": None, "attention_mask": None, "tile_table": None}
    plain = {"PACK": 4, "PACKED": False, "SPLIT": False, **absent, **no_tma}
    full = {"PACK": 1, "PACKED": True, "SPLIT": False, **no_tma}
    decode = {"PACK": 4, "PACKED": False, "SPLIT": True, **absent, **no_tma}
    given = {**common, **masks, "tile_table": "*i32"}
    found = [
        variant("causal, slots, 4 query heads per kv head", common, plain, entry.configuration),
        variant("packed documents, all masks", given, full, fitted(entry.configuration, 1 << 20, masked=True)),
        variant("one query", {**common, "out": "*fp32"}, decode, fitted(entry.configuration, 4)),
    ]
    if entry.configuration.get("TMA") and block_e == 0 and block_d == entry.head_dim:
        block = f"tensordesc<{TRITON_TYPES[entry.dtype]}[{entry.configuration['BLOCK_N']}, {block_d}]>"
        described = {**common, "k_descriptor": block, "v_descriptor": block}
        pointers = {k: v for k, v in plain.items() if k not in no_tma}
        found.append(variant("causal, slots, descriptors", described, pointers, entry.configuration))
    found.append(
        AotSignature(
            kernel=merge_splits,
            variant="",
            arguments={
                "parts": "*fp32",
                "part_lse": "*fp32",
                "out": pointer,
                "lse": "*fp32",
                **dict.fromkeys(("rows", "queries", "heads", "splits"), "i32"),
            },
            constexprs={"HEAD_DIM": entry.head_dim, **merge_blocks(entry.head_dim)},
            divisible=("parts", "part_lse", "out", "lse"),
            options={"num_warps": 4},
        )
    )
    found.append(
        AotSignature(
            kernel=place_tiles,
            variant="query tiles",
            arguments={
                "cu_seqlens": "*i32",
                "table": "*i32",
                **dict.fromkeys(
                    (
                        "documents",
                        "count",
                        "tokens",
                        "segments",
                        "segment_len",
                        "recurrence_len",
                        "tiles_per_segment",
                    ),
                    "i32",
                ),
            },
            constexprs={
                "SIZE": entry.constexprs["BLOCK_M"],
                "REVERSE": True,
                "DOCUMENTS": BLOCK_DOCUMENTS,
                "TILES": BLOCK_TILES,
            },
            divisible=("cu_seqlens", "table"),
            options={"num_warps": 4},
        )
    )
    return found
