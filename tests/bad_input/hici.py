"""Wrong calls of the HiCI half: (id, call, exception, what the message must say)."""

import torch

from hici_kernels import HiCIConfig, Rope, attention, local_slots
from hici_kernels.nn.global_integrator import GlobalIntegrator
from hici_kernels.nn.hici_attention import HiCIAttention
from hici_kernels.nn.local_constructor import LocalConstructor

SMALL = {"num_local_slots": 2, "global_slots": 2, "num_heads": 2, "bottleneck_dim": 4, "shared_compress_dim": 2}
Q, K = torch.zeros(2, 9, 4, 8), torch.zeros(2, 9, 2, 8)
LOCAL, SHARED = torch.zeros(2, 3, 5, 2, 8), torch.zeros(2, 3, 2, 8)
HIDDEN = torch.zeros(2, 9, 8)
LOCALS = torch.zeros(1, 3, 2, 8)
SLOTS = {
    "hidden": HIDDEN,
    "slot_queries": torch.zeros(3, 4),
    "k_weight": torch.zeros(4, 8),
    "v_weight": torch.zeros(4, 8),
}


def ints(*values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype)


def attend(q=Q, k=K, v=None, **options):
    return lambda: attention(q, k, k if v is None else v, **options)


def packed(cu, **options):
    return lambda: attention(Q[:1], K[:1], K[:1], cu_seqlens=cu, **options)


def slots(**changes):
    arguments = {**SLOTS, "num_heads": 2, **changes}
    return lambda: local_slots(**arguments)


def construct(hidden=HIDDEN, *arguments, **options):
    return lambda: LocalConstructor(8, 2, 2, 4)(hidden, *arguments, **options)


def integrate(local=LOCALS, **options):
    return lambda: GlobalIntegrator(8, 2, 2, 4, 2)(local, **options)


def config(**fields):
    return lambda: HiCIConfig(**fields)


def make(**changes):
    fields = {**SMALL, "segment_len": 4, **changes.pop("config", {})}
    arguments = {
        "hidden_size": 8,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 4,
        "config": HiCIConfig(**fields),
        "rope": Rope.from_theta(100.0, 4),
        **changes,
    }
    return HiCIAttention(**arguments)


def build(**changes):
    return lambda: make(**changes)


def forward(hidden=HIDDEN, config=None, **arguments):
    return lambda: make(config=config or {})(hidden, **arguments)


def cached(decode, act, prompt=9):
    """`act` on the cache of a layer that has read `prompt` tokens of two rows."""

    def call():
        layer = make(config={"decode": decode, "segment_len": 4})
        cache = layer.new_cache(2)
        with torch.no_grad():
            layer(HIDDEN[:, :prompt], cache=cache)
        return act(layer, cache)

    return call


def foreign(layer, cache):
    other = make(config={"decode": layer.config.decode}, num_kv_heads=4)
    return other(HIDDEN, cache=cache)


ATTENTION = [
    ("q-none", attend(q=None), TypeError, r"\bq must be a tensor"),
    ("q-3d", attend(q=Q[0]), ValueError, r"\bq must be \[B, T, Hq, D\]"),
    ("q-int", attend(q=Q.long(), k=K.long()), TypeError, r"\bq must be float"),
    ("k-batch", attend(k=K[:1]), ValueError, r"\bk must be .*got \[1"),
    ("k-head-dim", attend(k=K[..., :4]), ValueError, r"\bk must be"),
    ("v-shape", attend(v=K[:, :8]), ValueError, r"\bv must be"),
    ("v-dtype", attend(v=K.half()), TypeError, r"\bv has dtype torch.float16, expected torch.float32"),
    ("v-device", attend(v=K.to("meta")), ValueError, r"\bv is on meta, expected cpu"),
    ("q-heads-not-a-multiple", attend(q=Q[:, :, :3]), ValueError, r"\bq has 3 heads, expected a multiple of the 2"),
    ("q-zero-heads", attend(q=Q[:, :, :0]), ValueError, r"\bq must have at least 1 head"),
    ("k-zero-heads", attend(k=K[:, :, :0]), ValueError, r"\bk must have at least 1 head"),
    ("zero-head-dim", attend(q=Q[..., :0], k=K[..., :0]), ValueError, r"\bq must have head_dim at least 1"),
    ("more-queries-than-keys", attend(k=K[:, :5]), ValueError, r"\bq must have at most as many positions"),
    (
        "last-dim-strided",
        attend(q=Q.transpose(1, 3).contiguous().transpose(1, 3)),
        ValueError,
        r"\bq must be contiguous",
    ),
    ("segment-len-zero", attend(segment_len=0), ValueError, r"segment_len must be at least 1, got 0"),
    ("segment-len-negative", attend(segment_len=-4), ValueError, r"segment_len must be at least 1, got -4"),
    ("segment-len-float", attend(segment_len=4.0), TypeError, r"segment_len must be an int, got float"),
    ("segment-len-bool", attend(segment_len=True), TypeError, r"segment_len must be an int, got bool"),
    ("segment-len-beyond-int64", attend(segment_len=2**70), ValueError, r"segment_len must be at most"),
    ("recurrence-negative", attend(segment_len=4, recurrence_len=-1), ValueError, r"recurrence_len must be at least 0"),
    (
        "recurrence-beyond",
        attend(segment_len=4, recurrence_len=5),
        ValueError,
        r"recurrence_len must be at most 4, got 5",
    ),
    ("recurrence-beyond-int64", attend(recurrence_len=2**70), ValueError, r"recurrence_len must be at most"),
    ("global-k-alone", attend(global_k=SHARED), ValueError, r"global_v must be given together with global_k"),
    ("local-v-alone", attend(local_v=LOCAL, segment_len=4), ValueError, r"local_k must be given together"),
    ("global-segments", attend(global_k=LOCAL, global_v=LOCAL, segment_len=2), ValueError, r"global_k must be"),
    ("local-segments", attend(local_k=LOCAL, local_v=LOCAL, segment_len=2), ValueError, r"local_k must be"),
    ("local-4d", attend(local_k=SHARED, local_v=SHARED), ValueError, r"local_k must be \[B, N, M, Hkv, D\]"),
    ("local-v-shape", attend(local_k=LOCAL, local_v=LOCAL[:, :, :4], segment_len=3), ValueError, r"local_v must be"),
    ("global-dtype", attend(global_k=SHARED.double(), global_v=SHARED.double()), TypeError, r"global_k has dtype"),
    ("prefix-mask-int", attend(prefix_mask=ints(1)), TypeError, r"prefix_mask must be bool"),
    ("prefix-mask-list", attend(prefix_mask=[True]), TypeError, r"prefix_mask must be a bool tensor, got list"),
    ("prefix-mask-shape", attend(prefix_mask=torch.ones(4).bool()), ValueError, r"prefix_mask must be"),
    ("mask-shape", attend(attention_mask=torch.ones(2, 8)), ValueError, r"attention_mask must be"),
    ("mask-4d", attend(attention_mask=torch.ones(2, 1, 9, 9)), ValueError, r"attention_mask must be \[B, S\]"),
    ("mask-complex", attend(attention_mask=torch.ones(2, 9) * 1j), TypeError, r"attention_mask must be bool"),
    ("mask-device", attend(attention_mask=torch.ones(2, 9, device="meta")), ValueError, r"attention_mask is on meta"),
    ("cu-int64", packed(ints(0, 9, dtype=torch.int64)), TypeError, r"cu_seqlens must be int32"),
    ("cu-list", packed([0, 9]), TypeError, r"cu_seqlens must be a tensor"),
    ("cu-empty", packed(ints()), ValueError, r"cu_seqlens must have at least 1 entry"),
    ("cu-start", packed(ints(1, 9)), ValueError, r"cu_seqlens must run from 0 to 9, got 1 to 9"),
    ("cu-end", packed(ints(0, 8)), ValueError, r"cu_seqlens must run from 0 to 9, got 0 to 8"),
    ("cu-decreasing", packed(ints(0, 6, 4, 9)), ValueError, r"cu_seqlens must not decrease, got 6 followed by 4"),
    ("cu-batch", attend(cu_seqlens=ints(0, 9)), ValueError, r"cu_seqlens needs batch 1"),
    (
        "cu-fewer-queries",
        lambda: attention(Q[:1, :3], K[:1], K[:1], cu_seqlens=ints(0, 9)),
        ValueError,
        r"cu_seqlens needs",
    ),
    ("scale-nan", attend(scale=float("nan")), ValueError, r"scale must be finite"),
    ("scale-tensor", attend(scale=torch.ones(())), TypeError, r"scale must be a number, got Tensor"),
    ("causal-int", attend(causal=1), TypeError, r"causal must be a bool"),
    ("impl-unknown", attend(impl="fast"), ValueError, r"impl must be None or one of"),
]

LOCAL_SLOTS = [
    ("hidden-2d", slots(hidden=HIDDEN[0]), ValueError, r"hidden must be \[B, S, H\]"),
    ("hidden-no-channels", slots(hidden=HIDDEN[..., :0]), ValueError, r"hidden must have at least 1 channel"),
    ("queries-dtype", slots(slot_queries=SLOTS["slot_queries"].bfloat16()), TypeError, r"slot_queries has dtype"),
    ("queries-no-width", slots(slot_queries=torch.zeros(3, 0)), ValueError, r"slot_queries must have width"),
    ("k-weight-transposed", slots(k_weight=SLOTS["k_weight"].T), ValueError, r"k_weight must be \[E, H\] = \[4, 8\]"),
    ("v-weight-device", slots(v_weight=SLOTS["v_weight"].to("meta")), ValueError, r"v_weight is on meta"),
    ("num-heads-zero", slots(num_heads=0), ValueError, r"num_heads must be at least 1"),
    ("num-heads-no-divisor", slots(num_heads=3), ValueError, r"num_heads must divide the width 4"),
    ("segment-len-zero", slots(segment_len=0), ValueError, r"segment_len must be at least 1"),
    ("segment-len-beyond-int64", slots(segment_len=2**70), ValueError, r"segment_len must be at most"),
    ("mask-shape", slots(attention_mask=torch.ones(9)), ValueError, r"attention_mask must be \[B, S\]"),
    ("empty-unknown", slots(empty="skip"), ValueError, r"empty must be one of 'zero', 'uniform', got 'skip'"),
    ("total-wrong", slots(segment_len=4, total_segments=2), ValueError, r"total_segments must be 3 here, got 2"),
    (
        "total-missing-on-a-device",
        lambda: local_slots(
            **{name: x[:1].to("meta") if name == "hidden" else x.to("meta") for name, x in SLOTS.items()},
            num_heads=2,
            cu_seqlens=torch.empty(2, dtype=torch.int32, device="meta"),
        ),
        ValueError,
        r"total_segments must be given",
    ),
    ("cu-end", slots(hidden=HIDDEN[:1], cu_seqlens=ints(0, 5)), ValueError, r"cu_seqlens must run from 0 to 9"),
]

CONFIG = [
    ("slots-zero", config(num_local_slots=0), ValueError, r"num_local_slots must be at least 1"),
    ("heads-negative", config(num_heads=-8), ValueError, r"num_heads must be at least 1"),
    ("segments-zero", config(num_segments=0), ValueError, r"num_segments must be at least 1"),
    ("segment-len-string", config(segment_len="4"), TypeError, r"segment_len must be an int, got str"),
    (
        "bottleneck-not-a-multiple",
        config(bottleneck_dim=500),
        ValueError,
        r"bottleneck_dim must be a multiple of num_heads",
    ),
    ("integrator-heads", config(integrator_heads=7), ValueError, r"integrator_heads 7"),
    ("mode-unknown", config(context_mode="causal"), ValueError, r"context_mode must be one of"),
    ("mode-none-object", config(context_mode=None), ValueError, r"context_mode must be one of"),
    ("mode-list", config(context_mode=["none"]), ValueError, r"context_mode must be one of"),
    ("use-global-int", config(use_global=1), TypeError, r"use_global must be a bool"),
    (
        "recurrence-beyond",
        config(segment_len=4, recurrence_len=5),
        ValueError,
        r"recurrence_len must be at most segment_len 4",
    ),
    (
        "decode-needs-segment-len",
        config(decode="segment"),
        ValueError,
        r"segment_len must be given with decode='segment'",
    ),
    (
        "decode-needs-leak-free",
        config(decode="segment", segment_len=4, context_mode="none"),
        ValueError,
        r"context_mode must be one of .* with decode='segment'",
    ),
    ("empty-unknown", config(empty="none"), ValueError, r"empty must be one of"),
    ("cut-unknown", config(cut="row"), ValueError, r"cut must be one of"),
    ("from-dict-unknown", lambda: HiCIConfig.from_dict({"segments": 4}), ValueError, r"'segments' is not a field"),
    ("from-dict-list", lambda: HiCIConfig.from_dict([4]), TypeError, r"values must be a dict, got list"),
]

MODULES = [
    ("constructor-heads", lambda: LocalConstructor(8, 2, 4, 6), ValueError, r"num_heads must divide bottleneck_dim 6"),
    (
        "constructor-heads-hidden",
        lambda: LocalConstructor(15, 3, 2, 8),
        ValueError,
        r"num_heads must divide hidden_size 15, got 2",
    ),
    ("constructor-hidden-zero", lambda: LocalConstructor(0), ValueError, r"hidden_size must be at least 1"),
    (
        "constructor-input",
        lambda: LocalConstructor(8, 2, 2, 4)(HIDDEN[..., :5]),
        ValueError,
        r"hidden must be \[B, S, hidden_size\] = \[2, 9, 8\], got \[2, 9, 5\]",
    ),
    ("constructor-2d", construct(HIDDEN[0]), ValueError, r"hidden must be \[B, S, H\]"),
    ("constructor-list", construct([1.0]), TypeError, r"hidden must be a tensor \[B, S, H\], got list"),
    (
        "constructor-dtype",
        construct(HIDDEN.double()),
        TypeError,
        r"hidden has dtype torch.float64, expected torch.float32",
    ),
    ("constructor-int", construct(HIDDEN.long()), TypeError, r"hidden must be float32"),
    ("constructor-device", construct(HIDDEN.to("meta")), ValueError, r"hidden is on meta, expected cpu"),
    ("constructor-mask", construct(HIDDEN, torch.ones(2, 8)), ValueError, r"attention_mask must be \[B, S\]"),
    ("constructor-segment-len", construct(segment_len=0), ValueError, r"segment_len must be at least 1, got 0"),
    ("constructor-packed", construct(cu_seqlens=ints(0, 9)), ValueError, r"cu_seqlens needs batch 1"),
    ("constructor-total", construct(total_segments=2), ValueError, r"total_segments must be 1 here, got 2"),
    ("constructor-empty", lambda: LocalConstructor(8, empty="skip"), ValueError, r"empty must be one of"),
    ("integrator-heads", lambda: GlobalIntegrator(8, 2, 3, 4, 2), ValueError, r"num_heads must divide the width 4"),
    ("integrator-input", lambda: GlobalIntegrator(8, 2, 2, 4, 2)(HIDDEN), ValueError, r"local must be \[B, N, M, H\]"),
    (
        "integrator-channels",
        lambda: GlobalIntegrator(8, 2, 2, 4, 2)(torch.zeros(1, 3, 2, 5)),
        ValueError,
        r"local must be .*(8|hidden_size)",
    ),
    ("integrator-list", integrate([1]), TypeError, r"local must be a tensor \[B, N, M, H\], got list"),
    (
        "integrator-dtype",
        integrate(LOCALS.double()),
        TypeError,
        r"local has dtype torch.float64, expected torch.float32",
    ),
    ("integrator-low", integrate(LOCALS.bfloat16()), TypeError, r"local has dtype torch.bfloat16, expected"),
    ("integrator-device", integrate(LOCALS.to("meta")), ValueError, r"local is on meta, expected cpu"),
    ("integrator-causal", integrate(causal=1), TypeError, r"causal must be a bool, got int 1"),
    (
        "integrator-stats",
        integrate(stats=LOCALS),
        ValueError,
        r"stats must be \[..., 5, hidden_size 8\], got \[1, 3, 2, 8\]",
    ),
    ("integrator-stats-list", integrate(stats=[1]), TypeError, r"stats must be a tensor .*got list"),
    (
        "integrator-stats-dtype",
        integrate(stats=torch.zeros(1, 5, 8).double()),
        TypeError,
        r"stats has dtype torch.float64",
    ),
    (
        "integrator-valid",
        lambda: GlobalIntegrator(8, 2, 2, 4, 2)(torch.zeros(1, 3, 2, 8), valid=torch.ones(1, 2).bool()),
        ValueError,
        r"valid must be",
    ),
    ("layer-kv-heads", build(num_kv_heads=3), ValueError, r"num_heads must be a multiple of num_kv_heads 3"),
    ("layer-zero-heads", build(num_heads=0), ValueError, r"num_heads must be at least 1"),
    ("layer-zero-head-dim", build(head_dim=0), ValueError, r"head_dim must be at least 1"),
    (
        "layer-rope-too-wide",
        build(rope=Rope.from_theta(100.0, 8)),
        ValueError,
        r"rope.rotary_dim must be at most head_dim 4",
    ),
    ("layer-rope-none", build(rope=None), TypeError, r"rope must be a Rope"),
    (
        "layer-config-dict",
        lambda: HiCIAttention(8, 4, 2, 4, {}, rope=Rope.from_theta(9.0, 4)),
        TypeError,
        r"config must be",
    ),
    ("layer-eps-negative", build(qk_norm_eps=-1e-6), ValueError, r"qk_norm_eps must not be negative"),
    ("layer-eps-string", build(qk_norm_eps="1e-6"), TypeError, r"qk_norm_eps must be a number"),
    ("forward-2d", forward(HIDDEN[0]), ValueError, r"hidden must be \[B, S, H\]"),
    ("forward-width", forward(HIDDEN[..., :5]), ValueError, r"hidden must be \[B, S, hidden_size\]"),
    ("forward-dtype", forward(HIDDEN.double()), TypeError, r"hidden has dtype torch.float64, expected torch.float32"),
    ("forward-int", forward(HIDDEN.long()), TypeError, r"hidden must be float32"),
    ("forward-device", forward(HIDDEN.to("meta")), ValueError, r"hidden is on meta, expected cpu"),
    ("positions-float", forward(positions=torch.zeros(9)), TypeError, r"positions must be integer"),
    ("positions-shape", forward(positions=torch.zeros(8).long()), ValueError, r"positions must be \[S\] = \[9\]"),
    ("mask-shape", forward(attention_mask=torch.ones(2, 10)), ValueError, r"attention_mask must be"),
    (
        "packed-needs-segment-len",
        forward(HIDDEN[:1], config={"segment_len": None}, cu_seqlens=ints(0, 9)),
        ValueError,
        r"cu_seqlens needs config.segment_len",
    ),
    ("packed-batch", forward(cu_seqlens=ints(0, 9)), ValueError, r"cu_seqlens needs batch 1"),
    ("packed-list", forward(HIDDEN[:1], cu_seqlens=[0, 9]), TypeError, r"cu_seqlens must be a tensor"),
    (
        "packed-int64",
        forward(HIDDEN[:1], cu_seqlens=ints(0, 9, dtype=torch.int64)),
        TypeError,
        r"cu_seqlens must be int32",
    ),
    ("rope-int", lambda: Rope(ints(1, 2)), TypeError, r"inv_freq must be floating point"),
    ("rope-empty", lambda: Rope(torch.zeros(0)), ValueError, r"inv_freq must have at least 1 entry"),
    (
        "rope-rotary-dim",
        lambda: Rope(torch.ones(4), rotary_dim=6),
        ValueError,
        r"rotary_dim must be 2 \* len\(inv_freq\) = 8",
    ),
    ("rope-theta", lambda: Rope.from_theta(-1.0, 4), ValueError, r"theta must be positive"),
    ("rope-odd", lambda: Rope.from_theta(10.0, 5), ValueError, r"rotary_dim must be even"),
    ("rope-scaling-inf", lambda: Rope(torch.ones(2), float("inf")), ValueError, r"attention_scaling must be finite"),
]

CACHES = [
    ("new-cache-negative", lambda: make().new_cache(-1), ValueError, r"batch must be at least 0"),
    ("new-cache-float", lambda: make().new_cache(2.0), TypeError, r"batch must be an int"),
    ("not-a-cache", forward(cache={}), TypeError, r"cache must come from new_cache"),
    (
        "cache-batch",
        cached("full", lambda layer, c: layer(HIDDEN[:1], cache=c)),
        ValueError,
        r"cache holds 2 rows, expected 1",
    ),
    (
        "cache-of-another-rule",
        cached("full", lambda _, c: make(config={"decode": "segment"})(HIDDEN, cache=c)),
        TypeError,
        r"cache must",
    ),
    (
        "cache-of-another-config",
        cached("full", lambda _, c: make(config={"segment_len": 5})(HIDDEN, cache=c)),
        ValueError,
        r"cache was made",
    ),
    ("cache-of-another-layer", cached("full", foreign), ValueError, r"cache was filled by another layer"),
    ("segment-cache-of-another-layer", cached("segment", foreign), ValueError, r"cache was filled by another layer"),
    (
        "cache-packed",
        cached("full", lambda layer, c: layer(HIDDEN, cache=c, cu_seqlens=ints(0, 9))),
        ValueError,
        r"cu_seqlens cannot be combined with a cache",
    ),
    ("reset-row", cached("segment", lambda _, c: c.reset(2)), ValueError, r"row must be at most 1, got 2"),
    ("reset-float", cached("segment", lambda _, c: c.reset(1.0)), TypeError, r"row must be an int"),
    (
        "rewind-beyond",
        cached("full", lambda _, c: c.rewind(10)),
        ValueError,
        r"length must be at most the 9 tokens of row 0",
    ),
    ("rewind-negative", cached("full", lambda _, c: c.rewind(-1)), ValueError, r"length must be at least 0"),
    (
        "rewind-closed-segment",
        cached("segment", lambda _, c: c.rewind(7)),
        ValueError,
        r"length must be at least 8 for row 0",
    ),
    ("rewind-prompt", cached("slots", lambda _, c: c.rewind(8)), ValueError, r"length must be at least 9 for row 0"),
    ("reorder-range", cached("full", lambda _, c: c.reorder([0, 2])), ValueError, r"rows must be at most 1, got 2"),
    (
        "reorder-float",
        cached("full", lambda _, c: c.reorder(torch.zeros(2))),
        TypeError,
        r"rows must be a 1-D integer tensor",
    ),
    ("reorder-int", cached("full", lambda _, c: c.reorder(1)), TypeError, r"rows must be a tensor or a sequence"),
]

CASES = [
    (f"{group}-{name}", call, exception, message)
    for group, cases in (
        ("attention", ATTENTION),
        ("local_slots", LOCAL_SLOTS),
        ("HiCIConfig", CONFIG),
        ("HiCI-module", MODULES),
        ("HiCI-cache", CACHES),
    )
    for name, call, exception, message in cases
]
