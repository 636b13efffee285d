"""A HiCI layer: slots, integrator and attention together, and the same with the host's projections.

The other side is the sequence of PyTorch operations that the published code runs (HiCI, arXiv 2603.20843): every
segment's slots from two projections of its tokens, the slots stacked, their five statistics, then per segment
[global slots, local slots, tokens] concatenated for K and V and the segments stacked, K and V repeated to every query
head where those are more, and SDPA with is_causal on queries padded in front by as many rows as there are slots. Left
out, in its favour: the gathers and scatters by which it removes padding, since nothing is padded here.

"core" gets q, k and v as the projections would leave them, already rotated; the slots' own keys and values are part of
it on both sides. FLOPs: attention (4 D per query head and visible pair) and slots (4 S E (H + M)); the integrator and
the slots' projections are small. "with projections" adds 4 S H D (Hq + Hkv) and rotates. Bytes: what comes in and goes
out, and weights.

Every token sees all slots here (context_mode "none"), as in the published default, so that both sides do the same work.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from ..config import HiCIConfig
from ..nn import HiCIAttention
from ..ops.attention.api import attention
from ..rope import Rope
from .attention import K, M, pairs
from .case import Case, Inputs, Outputs, Part
from .shapes import LLAMA2_7B, TINY, Layer, drawn

CORE, WHOLE = "core", "with projections"
OPS = ("local_slots", "global_stats", "attention")
# With so few tokens in a segment the layer is compared with float64 where no head can be looked at alone.
CHECKED = 128
Modules = Callable[[torch.dtype, "str | None", int], HiCIAttention]


def modules(layer: Layer, width: int, heads: int, dtype: torch.dtype) -> Modules:
    """(dtype, impl, segment_len) -> the layer, always with the same weights, rounded to ``dtype`` and large enough that
    every slot matters. Weights are drawn on first use."""
    rope = Rope.from_theta(1e4, layer.d)

    def empty(impl: str | None, segment_len: int) -> HiCIAttention:
        config = HiCIConfig(
            num_local_slots=M,
            global_slots=K,
            num_heads=heads,
            bottleneck_dim=width,
            shared_compress_dim=width // 4,
            segment_len=segment_len,
            context_mode="none",
        )
        with torch.device("meta"):
            return HiCIAttention(layer.hidden, layer.hq, layer.hkv, layer.d, config, rope=rope, impl=impl)

    @functools.cache
    def state() -> dict[str, Tensor]:
        found = {}
        for seed, (name, like) in enumerate(empty(None, 1).state_dict().items()):
            if like.ndim < 2:  # norms and the scale of G
                found[name] = torch.full(like.shape, 0.0 if name.endswith("bias") else 1.0, dtype=dtype)
            else:
                found[name] = drawn(torch.float32, seed, *like.shape).div_(like.shape[1] ** 0.5).to(dtype)
        return found

    @functools.cache
    def low(impl: str | None, segment_len: int) -> HiCIAttention:
        return build(dtype, impl, segment_len)

    def build(kind: torch.dtype, impl: str | None, segment_len: int) -> HiCIAttention:
        found = empty(impl, segment_len)
        found.load_state_dict({n: w.to(kind) for n, w in state().items()}, assign=True)
        return found.requires_grad_(False)

    # the oracle's form is as large as all others together, and used once
    return lambda kind, impl, length: low(impl, length) if kind == dtype else build(kind, impl, length)


def sequence(module: HiCIAttention, hidden: Tensor, q: Tensor, k: Tensor, v: Tensor, segment_len: int) -> Tensor:
    """Context [B, S, Hq, D] by the published sequence of PyTorch operations."""
    b, s, _ = hidden.shape
    n = s // segment_len
    tokens = [slice(i * segment_len, (i + 1) * segment_len) for i in range(n)]
    local = torch.stack([slots_of(module, hidden[:, at]) for at in tokens], 1)
    shared = module.global_integrator.compress(statistics(local.flatten(1, 2)))
    global_k, global_v = module.project_slots(shared)
    local_k, local_v = module.project_slots(local)
    assert global_k is not None and global_v is not None and local_k is not None and local_v is not None
    keys = torch.stack([torch.cat((global_k, local_k[:, i], k[:, at]), 1) for i, at in enumerate(tokens)], 1)
    values = torch.stack([torch.cat((global_v, local_v[:, i], v[:, at]), 1) for i, at in enumerate(tokens)], 1)
    group = q.shape[2] // k.shape[2]
    if group > 1:
        keys, values = (x.repeat_interleave(group, 3) for x in (keys, values))
    keys, values = (x.flatten(0, 1).transpose(1, 2) for x in (keys, values))
    before = keys.shape[2] - segment_len
    queries = F.pad(q.unflatten(1, (n, segment_len)).flatten(0, 1), (0, 0, 0, 0, before, 0)).transpose(1, 2)
    out = F.scaled_dot_product_attention(queries, keys, values, is_causal=True)
    return out[:, :, before:].transpose(1, 2).reshape(b, s, q.shape[2], q.shape[3])


def slots_of(module: HiCIAttention, x: Tensor) -> Tensor:
    """Local slots [B, M, H] of one segment [B, t, H], by two projections of its tokens."""
    of = module.local_constructor
    b, t, _ = x.shape
    heads = of.num_heads
    q = of.q_proj(of.memory_slots).expand(b, -1, -1).unflatten(-1, (heads, -1)).transpose(1, 2)
    k = of.k_proj(x).view(b, t, heads, -1).transpose(1, 2)
    v = of.v_proj(x).view(b, t, heads, -1).transpose(1, 2)
    p = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)
    slots = (p @ v).transpose(1, 2).flatten(-2)
    return slots if of.o_proj is None else of.o_proj(slots)


def statistics(flat: Tensor) -> Tensor:
    """[B, 5, H] of all slots [B, N * M, H]."""
    mean = flat.mean(1)
    wide = flat if flat.dtype == torch.float64 else flat.float()
    std = wide.std(1, correction=0).clamp(min=1e-6).to(flat.dtype)
    unit = mean / mean.norm(dim=-1, keepdim=True).clamp(min=1e-6)
    return torch.stack((mean, flat.amax(1), flat.amin(1), std, unit), 1)


def core(layer: Layer, s: int, segment_len: int, width: int, heads: int, dtype: torch.dtype) -> Case:
    """Slots, integrator and attention, given rotated q and k."""
    get = modules(layer, width, heads, dtype)

    def inputs() -> Inputs:
        return {
            "hidden": drawn(dtype, 0, 1, s, layer.hidden),
            "q": drawn(dtype, 1, 1, s, layer.hq, layer.d),
            "k": drawn(dtype, 2, 1, s, layer.hkv, layer.d),
            "v": drawn(dtype, 3, 1, s, layer.hkv, layer.d),
            "heads": torch.arange(layer.hkv),
        }

    def call(x: Inputs, impl: str | None) -> Outputs:
        module = get(dtype, impl, segment_len)
        local = module.local_constructor(x["hidden"], segment_len=segment_len)
        global_k, global_v = module.project_slots(module.global_integrator(local))
        local_k, local_v = module.project_slots(local)
        return (
            attention(
                x["q"],
                x["k"],
                x["v"],
                segment_len=segment_len,
                global_k=global_k,
                global_v=global_v,
                local_k=local_k,
                local_v=local_v,
                impl=impl,
            ),
        )

    def plain(x: Inputs) -> Outputs:
        module = _heads(get(dtype, None, segment_len), x["heads"], x["hidden"].dtype, layer)
        return (sequence(module, x["hidden"], x["q"], x["k"], x["v"], segment_len),)

    kv = sorted({0, layer.hkv - 1})
    group = layer.hq // layer.hkv
    queries = torch.tensor([g * group + i for g in kv for i in range(group)])

    def cut(x: Inputs) -> Inputs:
        at = {"q": queries, "k": torch.tensor(kv), "v": torch.tensor(kv), "heads": torch.tensor(kv)}
        return {n: t if n == "hidden" else t.index_select(min(2, t.ndim - 1), at[n]) for n, t in x.items()}

    size = dtype.itemsize
    seen = layer.hq * pairs(s, segment_len, K + M)
    return Case(
        op="hici_layer",
        name=f"{layer.name}, {CORE}",
        dtype=dtype,
        shape=f"batch 1, {s} tokens, segments of {segment_len}, H {layer.hidden}, {layer.hq}/{layer.hkv} heads, "
        f"D {layer.d}, E {width}, {K} global and {M} local slots",
        inputs=inputs,
        call=call,
        plain=plain,
        flops=4 * layer.d * seen + 4 * s * width * (layer.hidden + M),
        bytes=size * (s * (layer.hidden + 2 * layer.d * (layer.hq + layer.hkv)) + _slot_weights(layer, width)),
        exps=seen,
        part=Part(
            f"kv heads {', '.join(map(str, kv))} of {layer.hkv}, of the timed call itself",
            cut,
            lambda found: tuple(x.index_select(2, queries) for x in found),
        ),
        needs=OPS,
        memory=True,
    )


def whole(layer: Layer, s: int, segment_len: int, width: int, heads: int, dtype: torch.dtype) -> Case:
    """The layer as a module: projections, rotation, slots, integrator, attention, output projection."""
    checked = min(CHECKED, segment_len)
    lengths = {s: segment_len, s // segment_len * checked: checked}
    get = modules(layer, width, heads, dtype)

    def module(x: Tensor, impl: str | None = None) -> HiCIAttention:
        return get(x.dtype, impl, lengths[x.shape[1]])

    def plain(x: Inputs) -> Outputs:
        hidden = x["hidden"]
        of = module(hidden)
        q, k, v = of.project(hidden, torch.arange(hidden.shape[1]))
        return (of.o_proj(sequence(of, hidden, q, k, v, lengths[hidden.shape[1]]).flatten(-2)),)

    def cut(x: Inputs) -> Inputs:
        return {"hidden": x["hidden"].unflatten(1, (-1, segment_len))[:, :, :checked].flatten(1, 2)}

    size = dtype.itemsize
    projections = layer.hidden * layer.d * (layer.hq + layer.hkv)  # q and o, k and v: twice this
    seen = layer.hq * pairs(s, segment_len, K + M)
    return Case(
        op="hici_layer",
        name=f"{layer.name}, {WHOLE}",
        dtype=dtype,
        shape=f"batch 1, {s} tokens, segments of {segment_len}, H {layer.hidden}, {layer.hq}/{layer.hkv} heads, "
        f"D {layer.d}, E {width}, {K} global and {M} local slots",
        inputs=lambda: {"hidden": drawn(dtype, 0, 1, s, layer.hidden)},
        call=lambda x, impl: (module(x["hidden"], impl)(x["hidden"]),),
        plain=plain,
        flops=4 * layer.d * seen + 4 * s * width * (layer.hidden + M) + 4 * s * projections,
        bytes=size * (2 * s * layer.hidden + 2 * projections + _slot_weights(layer, width)),
        exps=seen,
        part=Part(
            f"{s // segment_len} segments of {checked} tokens against float64; the timed call against plain PyTorch",
            cut,
            None,
        ),
        needs=OPS,
        memory=True,
        judged=False,
    )


def _heads(module: HiCIAttention, heads: Tensor, dtype: torch.dtype, layer: Layer) -> HiCIAttention:
    """The layer with the slot projections of some kv heads alone, in ``dtype``."""
    if len(heads) == layer.hkv and dtype == module.k_proj.weight.dtype:
        return module
    found = copy.copy(module)
    found._modules = dict(module._modules)
    rows = (heads[:, None] * layer.d + torch.arange(layer.d)).flatten()
    for name in ("k_proj", "v_proj"):
        weight = getattr(module, name).weight[rows].to(dtype)
        with torch.device("meta"):
            linear = torch.nn.Linear(layer.hidden, len(rows), bias=False)
        linear.load_state_dict({"weight": weight}, assign=True)
        found._modules[name] = linear.requires_grad_(False)
    for name in ("local_constructor", "global_integrator"):
        found._modules[name] = copy.deepcopy(getattr(module, name)).to(dtype)
    found.num_kv_heads = len(heads)
    return found


def _slot_weights(layer: Layer, width: int) -> int:
    """Elements of the constructor, the integrator and the host's k and v projections."""
    constructor = 4 * width * layer.hidden + M * layer.hidden
    integrator = layer.hidden * (width // 4 + width) + width * (width // 4) + 4 * width * width + K * width
    return constructor + integrator + 2 * layer.hidden * layer.hkv * layer.d


def cases(suite: str) -> list[Case]:
    if suite == "quick":
        return [f(TINY, 512, 128, 64, 4, torch.bfloat16) for f in (core, whole)]
    if suite == "cpu":
        return [f(LLAMA2_7B, 16384, 4096, 512, 8, torch.bfloat16) for f in (core, whole)]
    return []
