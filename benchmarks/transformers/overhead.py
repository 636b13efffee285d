"""What the integration itself costs per attention layer: hooks, masks, cache layers, the attention function.

    python benchmarks/transformers/overhead.py [--json result.json]        exit status 1 where a layer costs over 50 us

A decode step (one token, one row) of one attention module of a small Llama, without any attention: the method's own
work is replaced by a function that returns zeros. Beside it, the same module with an attention function and a cache
layer that do nothing. Both in one process, alternating; the difference of the medians is the wrapper.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers as hf
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from hici_kernels import HGAConfig, HiCIConfig, KVStore
from hici_kernels.bench.machine import describe, spread
from hici_kernels.bench.run import alternate
from hici_kernels.integrations import HGACache, apply_hga, apply_hici, restore
from hici_kernels.integrations.hga_cache import HGALayer
from hici_kernels.integrations.layers import AppendedLayer
from hici_kernels.nn.slot_attention import SlotAttention

#: the goal, per layer
LIMIT_S = 50e-6
HEADS, DIM = 4, 16


class _BareLayer(DynamicLayer):
    """Hands new keys and values through, as the library's own layers do."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return key_states, value_states


def bare(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> tuple[Tensor, None]:
    """No attention at all."""
    return query.new_zeros(query.shape[0], query.shape[2], HEADS, DIM), None


def model() -> Any:
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=32, hidden_size=HEADS * DIM, intermediate_size=32, num_hidden_layers=2, num_attention_heads=HEADS,
        num_key_value_heads=2,
    )  # fmt: skip
    return hf.LlamaForCausalLM(config).eval()


def step(changed: Any, cache: Any, layer: int = 1) -> Any:
    """A call of the second attention module (the first also reads the mask for all)."""
    attention, held = changed.model.layers[layer].self_attn, cache.layers[layer]
    hidden, at = torch.randn(1, 1, HEADS * DIM), torch.tensor([[100]])
    kwargs = {
        "position_embeddings": changed.model.rotary_emb(hidden, at),
        "position_ids": at,
        "attention_mask": None,
        "past_key_values": cache,
    }
    if not isinstance(held, AppendedLayer):
        return lambda: attention(hidden, **kwargs)
    # nothing is masked, one column more than are held
    kwargs["attention_mask"] = torch.empty(1, held.count + 1, 0, dtype=torch.bool)

    def again() -> None:
        attention(hidden, **kwargs)
        # every call is the first after the prompt
        if isinstance(held, HGALayer):
            held.length -= 1
            held.history.columns.crop(int(layer == 0))
        else:
            held.columns.crop(1)

    return again


def measure(rounds: int) -> list[dict[str, Any]]:
    hf.AttentionInterface.register("bare", bare)
    plain = model()
    plain.set_attn_implementation("bare")
    empty = DynamicCache(config=plain.config)
    empty.layers = [_BareLayer(), _BareLayer()]
    rows = []

    def attend(self: KVStore, layer: int, q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> Tensor:
        return q.new_zeros(q.shape)

    def slots(self: SlotAttention, hidden: Tensor, q: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return q.new_zeros(*q.shape[:2], HEADS * DIM)

    with torch.no_grad():
        for name in ("hga, first layer", "hga", "hici"):
            changed, ids = model(), torch.arange(1, 20)[None]
            if name.startswith("hga"):
                apply_hga(changed, HGAConfig())
                cache: Any = HGACache(changed)
            else:
                apply_hici(changed, HiCIConfig(num_heads=4, bottleneck_dim=16, shared_compress_dim=8, segment_len=8,
                                               decode="segment"))  # fmt: skip
                cache = DynamicCache(config=changed.config)
            changed(ids, past_key_values=cache)
            layer = 0 if "first" in name else 1
            with mock.patch.object(KVStore, "attend", attend), mock.patch.object(SlotAttention, "attend", slots):
                sides = {"wrapped": step(changed, cache, layer), "bare": step(plain, empty, layer)}
                times = alternate(sides, rounds)
            row = {"method": name, **{side: spread(t) for side, t in times.items()}}
            row["overhead_s"] = row["wrapped"]["median_s"] - row["bare"]["median_s"]
            row["within_limit"] = row["overhead_s"] < LIMIT_S
            rows.append(row)
            restore(changed)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    result = {"machine": describe() | {"transformers": hf.__version__}, "limit_s": LIMIT_S,
              "rows": measure(options.rounds)}  # fmt: skip
    about = result["machine"]
    versions = f"torch {about['torch']}, transformers {about['transformers']}"
    print(f"{about['cpu']['model']}, {about['threads']} threads, {versions}")
    print(f"{'method':18} {'overhead':>9}   attention module, one token: wrapped / bare (median, fastest - slowest)")
    for row in result["rows"]:
        sides = " / ".join(
            f"{1e6 * s['median_s']:.1f} us ({1e6 * s['fastest_s']:.1f} - {1e6 * s['slowest_s']:.1f})"
            for s in (row["wrapped"], row["bare"])
        )
        print(f"{row['method']:18} {1e6 * row['overhead_s']:6.1f} us   {sides}")
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    late = [row["method"] for row in result["rows"] if not row["within_limit"]]
    if late:
        raise SystemExit(f"over the limit of {1e6 * LIMIT_S:.0f} us a layer: {', '.join(late)}")


if __name__ == "__main__":
    main()
