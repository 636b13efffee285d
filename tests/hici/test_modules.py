"""LocalConstructor, GlobalIntegrator, HiCIConfig and Rope by themselves."""

import copy
import dataclasses
import itertools
import json
import pickle
import random

import pytest
import torch
from hici_cases import HIDDEN, build, close, random_config, random_mask, random_offsets
from hici_oracle import column_segments, integrate, rotate, slots_of

from hici_kernels import HiCIConfig, Rope
from hici_kernels.nn.global_integrator import GlobalIntegrator
from hici_kernels.nn.local_constructor import LocalConstructor


def randomised(module, seed):
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape))
    return module.double()


def parameters(module):
    return {name: x.detach() for name, x in module.state_dict().items()}


@pytest.mark.parametrize("seed", range(30))
def test_local_constructor(seed):
    rng = random.Random(seed)
    empty, packed = rng.choice(["zero", "uniform"]), rng.random() < 0.4
    module = randomised(LocalConstructor(8, 3, 2, rng.choice([None, 4]), empty), seed)
    batch, length, segment_len = 1 if packed else 2, rng.randint(0, 10), rng.choice([None, 2, 3])
    hidden = torch.randn(batch, length, 8, dtype=torch.float64)
    mask, cu = random_mask(rng, batch, length), random_offsets(rng, length, 3) if packed else None
    found = module(hidden, mask, segment_len, cu)
    p = parameters(module)
    segments = column_segments(length, segment_len, cu)
    assert found.shape == (batch, len(segments), 3, 8)
    for b, (i, (columns, _)) in itertools.product(range(batch), enumerate(segments)):
        tokens = {c for c in columns if mask is None or mask[b, c]}
        queries = p["memory_slots"] @ p["q_proj.weight"].T
        one = slots_of(hidden[b], columns, tokens, queries, p["k_proj.weight"], p["v_proj.weight"], 2, empty)
        one = one @ p["o_proj.weight"].T if "o_proj.weight" in p else one
        close(found[b, i].detach(), one, 1e-10, f"{seed} row {b} segment {i}")


@pytest.mark.parametrize("shared, width", [(None, 4), (2, 4), (4, 4), (6, 4)])
@pytest.mark.parametrize("seed", range(5))
def test_global_integrator(shared, width, seed):
    module = randomised(GlobalIntegrator(8, 3, 2, width, shared), seed)
    p, n = parameters(module), 5
    local = torch.randn(2, n, 2, 8, dtype=torch.float64)
    valid = torch.rand(2, n) < 0.7
    valid[:, 0] = True
    for keep in (None, valid):
        whole, running = module(local, valid=keep), module(local, causal=True, valid=keep)
        assert whole.shape == (2, 3, 8) and running.shape == (2, n, 3, 8)
        for b in range(2):
            for i in range(n):
                kept = [local[b, j] for j in range(i + 1) if keep is None or keep[b, j]]
                close(running[b, i].detach(), integrate(torch.cat(kept), p, 2), 1e-9, f"G_{i}")
            close(whole[b].detach(), running[b, -1].detach(), 1e-9)
    cu = torch.tensor([0, 2, 2, 5], dtype=torch.int32)
    packed, restarted = module(local[:1], cu_segments=cu), module(local[:1], causal=True, cu_segments=cu)
    assert packed.shape == restarted.shape == (1, n, 3, 8)
    for a, b in ((0, 2), (2, 5)):
        close(packed[:, a:b].detach(), module(local[:1, a:b]).unsqueeze(1).expand(-1, b - a, -1, -1).detach(), 1e-10)
        close(restarted[:, a:b].detach(), module(local[:1, a:b], causal=True).detach(), 1e-10)


def test_slot_order_is_invisible_to_the_integrator():
    module = randomised(GlobalIntegrator(8, 3, 2, 4, 2), 0)
    local = torch.randn(1, 4, 2, 8, dtype=torch.float64)
    close(module(local.flip(1)).detach(), module(local).detach(), 1e-10)


@pytest.mark.parametrize("n", [0, 1])
def test_integrator_without_segments(n):
    module = GlobalIntegrator(8, 3, 2, 4, 2)
    assert module(torch.zeros(0, n, 2, 8)).shape == (0, 3, 8)
    assert module(torch.zeros(2, n, 2, 8), causal=True).shape == (2, n, 3, 8)
    assert module(torch.zeros(2, n, 2, 8), causal=True).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_modules_alone_under_autocast(dtype):
    """Tensors of another dtype than the weights are fine there, and only there."""
    local_constructor, integrator = LocalConstructor(8, 3, 2, 4), GlobalIntegrator(8, 3, 2, 4, 2)
    hidden = torch.randn(2, 7, 8)
    with torch.no_grad():
        slots = local_constructor(hidden, segment_len=3)
        expected = integrator(slots)
        with torch.autocast("cpu", torch.bfloat16):
            low = local_constructor(hidden.to(dtype), segment_len=3)
            found = integrator(low.to(dtype))
            running = integrator(low, stats=torch.ones(2, 5, 8, dtype=dtype))
    assert low.dtype == found.dtype == running.dtype == torch.bfloat16
    close(low, slots, 0.05)
    close(found, expected, 0.05)


@pytest.mark.parametrize("part", ["local_constructor", "global_integrator"])
def test_wrong_arguments_are_found_before_any_work(part, monkeypatch):
    layer, _ = build(HiCIConfig(num_heads=2, bottleneck_dim=4, compress_dim=4, shared_compress_dim=2))
    module = getattr(layer, part)
    for child in module.modules():
        if child is not module:
            monkeypatch.setattr(child, "forward", None)
    shape = (2, 7, 8) if part == "local_constructor" else (2, 3, 2, 8)
    wrong = torch.zeros(shape[0], 1, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"attention_mask must be|valid must be"):
        module(torch.zeros(shape, dtype=torch.float64), **{"attention_mask" if len(shape) == 3 else "valid": wrong})
    with pytest.raises(TypeError, match=r"(hidden|local) has dtype torch.float32, expected torch.float64"):
        module(torch.zeros(shape))


LOCAL_KEYS = {f"local_constructor.{x}" for x in ("memory_slots", "q_proj.weight", "k_proj.weight", "v_proj.weight")}
GLOBAL_KEYS = {
    f"global_integrator.{x}"
    for x in ("global_queries", "expand_scale_param", "expand.weight", *tuple(f"{p}_proj.weight" for p in "qkvo"))
}


def normalised(prefix):
    return {f"global_integrator.{prefix}.{x}" for x in ("0.weight", "1.weight", "1.bias")}


@pytest.mark.parametrize("eps", [None, 1e-6])
@pytest.mark.parametrize("bottleneck", [None, 4])
@pytest.mark.parametrize("shared", [None, 2, 4, 8])
def test_state_dict_keys_are_the_published_ones(eps, bottleneck, shared):
    c = HiCIConfig(num_heads=2, bottleneck_dim=bottleneck, compress_dim=4, shared_compress_dim=shared)
    layer, _ = build(c, eps=eps)
    expected = LOCAL_KEYS | GLOBAL_KEYS | {f"{p}_proj.weight" for p in "qkvo"}
    if bottleneck is not None:
        expected |= {"local_constructor.o_proj.weight"}
    if eps is not None:
        expected |= {"q_norm.weight", "k_norm.weight"}
    if shared is None:
        expected |= set().union(*(normalised(f"stat_compressors.{i}") for i in range(5)))
    else:
        expected |= normalised("shared_compressor") | (normalised("stat_expand") if shared < 4 else set())
    assert set(layer.state_dict()) == expected
    assert layer.state_dict()["global_integrator.expand_scale_param"].shape == ()


def test_published_sizes():
    """Parameter counts of the Llama-2-7B layer in the table of the published checkpoints."""
    with torch.device("meta"):
        local, shared = LocalConstructor(4096), GlobalIntegrator(4096)
        separate, wide = GlobalIntegrator(4096, shared_compress_dim=None), LocalConstructor(4096, bottleneck_dim=None)
    counts = [sum(p.numel() for p in m.parameters()) for m in (local, shared, separate, wide)]
    assert counts == [8_421_376, 3_738_881, 13_638_657, 50_364_416]


def test_config_round_trip(tmp_path):
    for seed in range(20):
        c = random_config(random.Random(seed))
        assert HiCIConfig.from_dict(json.loads(json.dumps(c.to_dict()))) == c
        c.save(tmp_path / "config.json")
        assert HiCIConfig.load(tmp_path / "config.json") == c
    with pytest.raises(dataclasses.FrozenInstanceError):
        c.num_heads = 1


def test_config_defaults():
    c = HiCIConfig()
    assert (c.context_mode, c.cut, c.decode, c.empty, c.single_segment) == (
        "causal_shift",
        "index",
        "full",
        "skip",
        "on",
    )
    assert HiCIConfig(segment_len=4, decode="segment").cut == "token"
    assert HiCIConfig(segment_len=4, decode="segment", cut="index").cut == "index"
    assert c.integrator_dim == 512 and HiCIConfig(bottleneck_dim=None).integrator_dim == 512
    assert HiCIConfig(bottleneck_dim=64).integrator_dim == 64 and c.integrator_num_heads == 8


WAYS = {
    "replace": dataclasses.replace,
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda c: pickle.loads(pickle.dumps(c)),
    "dict": lambda c: HiCIConfig.from_dict(c.to_dict()),
    "keywords": lambda c: HiCIConfig(**c.to_dict()),
    "JSON": lambda c: HiCIConfig.from_dict(json.loads(json.dumps(c.to_dict()))),
    "repr": lambda c: eval(repr(c)),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("given", [{}, {"cut": None}, {"cut": "index"}, {"cut": "token"}])
def test_whether_cut_was_given_is_part_of_a_config(given, way):
    """What is equal behaves alike: read, changed, and in apply_hici, which fills in what was not given."""
    c = HiCIConfig(segment_len=8, **given)
    again = WAYS[way](c)
    assert again == c and hash(again) == hash(c) and repr(again) == repr(c)
    segment = dataclasses.replace(again, decode="segment")
    assert segment == HiCIConfig(segment_len=8, decode="segment", **given)
    assert segment.cut == (given.get("cut") or "token")
    assert again.with_default_cut("token").cut == (given.get("cut") or "token")
    assert dataclasses.replace(segment, decode="full", cut=None) == HiCIConfig(segment_len=8)


def test_a_config_that_was_given_its_default_cut_is_another_one():
    plain, stated = HiCIConfig(), HiCIConfig(cut="index")
    assert plain.cut == stated.cut == "index" and plain != stated
    assert (plain.to_dict()["cut"], stated.to_dict()["cut"]) == (None, "index")
    assert plain.with_default_cut() == stated == stated.with_default_cut("token")
    assert HiCIConfig.from_dict({**plain.to_dict(), "cut": "index"}) == stated
    assert plain != plain.to_dict() and plain == HiCIConfig(cut=None)


def test_config_file_of_a_cut_by_context(tmp_path):
    HiCIConfig(segment_len=8).save(tmp_path / "config.json")
    assert json.loads((tmp_path / "config.json").read_text())["cut"] is None
    loaded = HiCIConfig.load(tmp_path / "config.json")
    assert loaded == HiCIConfig(segment_len=8) and dataclasses.replace(loaded, decode="segment").cut == "token"


@pytest.mark.parametrize("rotary", [2, 4, 6])
def test_rope(rotary):
    rope = Rope(torch.rand(rotary // 2, dtype=torch.float64), attention_scaling=1.3)
    x, at = torch.randn(2, 5, 3, 6, dtype=torch.float64), torch.randint(0, 99, (2, 5))
    found = rope.rotate(x, at)
    for b, t in itertools.product(range(2), range(5)):
        close(found[b, t], rotate(x[b, t], at[b, t], rope.inv_freq, 1.3), 1e-12)
    close(rope.rotate(x, at[0]), rope.rotate(x, at[:1].expand(2, -1)), 1e-15)


def test_layer_gradient_reaches_every_parameter():
    layer, _ = build(
        HiCIConfig(num_heads=2, bottleneck_dim=4, compress_dim=4, shared_compress_dim=2, segment_len=3), eps=1e-6
    )
    layer(torch.randn(1, 8, HIDDEN, dtype=torch.float64)).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in layer.parameters())
