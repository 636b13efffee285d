"""What the ranks of test_models.py and test_kv_heads.py compute."""

from __future__ import annotations

import dataclasses
import tempfile
from typing import Any

import torch
import torch.distributed as dist

from hici_kernels import HGAConfig, HiCIConfig, Rope
from hici_kernels.distributed import (
    ContextParallel,
    apply_context_parallel,
    fsdp_sums_gradients,
    remove_context_parallel,
    scalar_parameters,
    shard_hga,
)
from hici_kernels.nn import HGAAttention

LENGTH = 45


def _llama() -> Any:
    import transformers as hf

    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
    }
    return hf.LlamaForCausalLM(hf.LlamaConfig(**sizes))


def _config(mode: str) -> HiCIConfig:
    return HiCIConfig(
        segment_len=8,
        num_local_slots=3,
        global_slots=2,
        num_heads=2,
        bottleneck_dim=8,
        shared_compress_dim=4,
        context_mode=mode,
        recurrence_len=3,
    )


def language_model(mode: str, fsdp: bool, checkpointing: bool) -> tuple[float, float]:
    """A Llama with slots, trained one step: |difference| of loss and gradients between one process and ranks."""
    from hici_kernels.integrations import apply_hici

    model = apply_hici(_llama(), _config(mode)).train()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "local_constructor" in name or "global_integrator" in name:
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * 0.3)
    ids = torch.randint(0, 61, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[0, :20] = -100
    whole = model(input_ids=ids, labels=labels, use_cache=False).loss
    whole.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    exchange = ContextParallel(_config(mode))
    apply_context_parallel(model, exchange)
    if fsdp:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        scalars = scalar_parameters(model)
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh, ignored_params=scalars)
        fully_shard(model, mesh=mesh, ignored_params=scalars)
        fsdp_sums_gradients(model)
    exchange.split(LENGTH)
    loss = model(**exchange.inputs(ids, labels)).loss
    loss.backward()
    total = loss.detach().clone()
    dist.all_reduce(total)
    worst = 0.0
    if fsdp:
        exchange.sum_gradients(scalars)
        grads = {n: p.grad if p.ndim == 0 else p.grad.full_tensor() for n, p in model.named_parameters()}
    else:
        exchange.sum_gradients(model.parameters())
        grads = {name: p.grad for name, p in model.named_parameters()}
    for name, g in grads.items():
        worst = max(worst, float((g - expected[name]).abs().max() / expected[name].abs().max().clamp(min=1.0)))
    if not fsdp:
        remove_context_parallel(model)
        again = model(input_ids=ids, labels=labels, use_cache=False).loss
        assert torch.equal(again, whole)
    return float((total - whole).abs()), worst


HGA = HGAConfig(chunk_size=4, group_size=2, keep_first=1, keep_last=1, topk_chunks=2, topk_groups=2)


def _hga(num_kv_heads: int, share: str) -> HGAAttention:
    torch.manual_seed(0)
    config = HGAConfig.from_dict({**HGA.to_dict(), "share": share})
    layer = HGAAttention(24, 2 * num_kv_heads, num_kv_heads, 8, config, rope=Rope.from_theta(50.0, 8), qk_norm_eps=1e-6)
    return layer


def heads(num_kv_heads: int, share: str, tier: str) -> dict[str, float]:
    """Prefill, decode and gradients of one layer over ranks against one process."""
    from hici_kernels import KVStore

    layer = _hga(num_kv_heads, share)
    part = shard_hga(layer)
    torch.manual_seed(1)  # every rank has made a module of another size
    x = torch.randn(1, 50, 24)
    up = torch.randn(1, 50, 24)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    one, many = layer(a), part(b)
    one.backward(up)
    many.backward(up)
    h, kv, d = part.shard.heads, part.shard.kv_heads, 8
    found = {"out": _far(one, many), "hidden": _far(a.grad, b.grad)}
    rows = {"q_proj": h, "k_proj": kv, "v_proj": kv}
    for name, own in rows.items():
        expected = getattr(layer, name).weight.grad[own.start * d : own.stop * d]
        found[name] = _far(expected, getattr(part.layer, name).weight.grad)
    found["o_proj"] = _far(layer.o_proj.weight.grad[:, h.start * d : h.stop * d], part.layer.o_proj.weight.grad)
    norm = part.layer.q_norm.weight.grad.clone()
    dist.all_reduce(norm)
    found["q_norm"] = _far(layer.q_norm.weight.grad, norm)
    store = KVStore(
        layer.config, rope=layer.rope, layers=1, kv_heads=num_kv_heads, head_dim=8, dtype=x.dtype, device="cpu"
    )
    options = {"path": tempfile.gettempdir()} if tier == "disk" else {}
    with torch.no_grad(), store, part.new_store(tier=tier, **options) as mine:
        far = 0.0
        for piece in (x[:, :30], *x[:, 30:].split(1, 1)):
            far = max(far, _far(layer(piece, cache=store), part(piece, cache=mine)))
        assert mine.lengths.tolist() == [50]
    assert part.traffic.total > 0
    return {**found, "decode": far}


def _far(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.detach(), b.detach()
    return float((a - b).abs().max() / a.abs().max().clamp(min=1.0))


def steps(cases: list[tuple[str, bool, bool]]) -> dict[str, tuple[float, float]]:
    return {str(case): language_model(*case) for case in cases}


def layers(cases: list[tuple[int, str, str]]) -> dict[str, dict[str, float]]:
    return {str(case): heads(*case) for case in cases}


def padded() -> dict[str, float]:
    """|difference| of logits between one process and ranks of which only the last has padding, by rule for gaps."""
    from hici_kernels.integrations import apply_hici

    ids = torch.randint(0, 61, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    found = {}
    for empty, recurrence in (("skip", 0), ("zero", 3)):
        config = dataclasses.replace(_config("causal_shift"), cut="index", empty=empty, recurrence_len=recurrence)
        for columns in (5, 13):
            mask = torch.ones(2, LENGTH, dtype=torch.long)
            mask[1, -columns:] = 0
            model = apply_hici(_llama(), config)
            expected = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            exchange = ContextParallel(config)
            apply_context_parallel(model, exchange)
            exchange.split(LENGTH, attention_mask=mask)
            got = model(**exchange.inputs(ids), attention_mask=exchange.shard(mask)).logits
            seen = exchange.shard(mask).bool()
            found[f"{empty} {columns}"] = float((got - exchange.shard(expected))[seen].abs().max())
    for changes, message in (({"cut": "token"}, "use cut='index'"), ({"empty": "skip"}, "is not supported")):
        config = dataclasses.replace(_config("causal_shift"), **{"cut": "index", **changes})
        try:
            ContextParallel(config).split(LENGTH, attention_mask=mask)
            found[message] = float("inf")
        except ValueError as error:
            found[message] = 0.0 if message in str(error) else float("inf")
    return found


def frozen() -> tuple[bool, bool, bool, bool]:
    """Whether anything of a shard of a frozen layer in eval mode is trained, its mode, and both of a plain one."""
    plain, still = shard_hga(_hga(2, "query")), shard_hga(_hga(2, "query").requires_grad_(False).eval())
    trained = [any(p.requires_grad for p in x.parameters()) for x in (still, plain)]
    return trained[0], still.training, trained[1], plain.training
