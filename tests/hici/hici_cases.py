"""Random layers, masks and packings for the tests of this folder."""

import random

import torch
from hici_oracle import MODES, Layer

from hici_kernels import HiCIConfig, Rope
from hici_kernels.nn.hici_attention import HiCIAttention

HIDDEN = 8


def build(config, *, heads=4, kv_heads=2, head_dim=4, rotary=4, eps=None, seed=0, dtype=torch.float64):
    """A layer whose parameters are all of order 1 (the published initialisation makes G invisible), and its oracle."""
    torch.manual_seed(seed)
    rope = Rope.from_theta(50.0, rotary)
    layer = HiCIAttention(HIDDEN, heads, kv_heads, head_dim, config, rope=rope, qk_norm_eps=eps)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn(p.shape) * (0.6 if p.dim() > 1 else 1.0))
    return layer.to(dtype), oracle_of(layer, eps)


def oracle_of(layer, eps=None, state=None):
    state = {name: x.detach().double() for name, x in layer.state_dict().items()} if state is None else state
    return Layer(
        state,
        layer.config,
        num_heads=layer.num_heads,
        num_kv_heads=layer.num_kv_heads,
        head_dim=layer.head_dim,
        inv_freq=layer.rope.inv_freq,
        qk_norm_eps=eps,
    )


def random_config(rng, **fixed):
    """Any valid configuration; `fixed` fields are kept."""
    while True:
        fields = {
            "num_local_slots": rng.randint(1, 3),
            "global_slots": rng.randint(1, 2),
            "num_heads": rng.choice([1, 2]),
            "bottleneck_dim": rng.choice([None, 4, 8]),
            "compress_dim": rng.choice([4, 6]),
            "integrator_heads": rng.choice([1, 2]),
            "shared_compress_dim": rng.choice([None, 2, 6, 8]),
            "num_segments": rng.randint(1, 4),
            "segment_len": rng.choice([None, 1, 2, 3, 4, 20]),
            "context_mode": rng.choice(MODES),
            "use_global": rng.random() < 0.75,
            "use_local": rng.random() < 0.75,
            "recurrence_len": rng.choice([0, 0, 1, 2]),
            "single_segment": rng.choice(["on", "off"]),
            "empty": rng.choice(["skip", "zero", "uniform"]),
            "cut": rng.choice(["index", "token"]),
            "decode": "full",
        }
        fields.update(fixed)
        if fields["segment_len"] is not None and fields["recurrence_len"] > fields["segment_len"]:
            fields["recurrence_len"] = fields["segment_len"]
        try:
            return HiCIConfig(**fields)
        except ValueError:
            continue


def random_layer(seed, **fixed):
    rng = random.Random(seed)
    config = random_config(rng, **fixed)
    heads, kv = rng.choice([(4, 2), (2, 2), (3, 1)])
    eps = rng.choice([None, 1e-6])
    layer, oracle = build(config, heads=heads, kv_heads=kv, rotary=rng.choice([2, 4]), eps=eps, seed=seed)
    return rng, layer, oracle


def random_mask(rng, batch, length, kind=None):
    """[B, S] int64 of one of the patterns a tokenizer, a packer or an adversary makes; None = no mask."""
    kind = kind or rng.choice(["none", "left", "right", "holes", "gap", "mixed", "empty_row"])
    if kind == "none" or batch == 0:
        return None
    mask = torch.ones(batch, length, dtype=torch.int64)
    for b in range(batch):
        row = kind if kind != "mixed" else rng.choice(["left", "right", "holes", "gap", "full"])
        n = rng.randint(0, length)
        if row == "left":
            mask[b, :n] = 0
        elif row == "right":
            mask[b, length - n :] = 0
        elif row == "holes":
            mask[b] = torch.tensor([rng.random() < 0.6 for _ in range(length)]).long()
        elif row == "gap":
            a = rng.randint(0, length)
            mask[b, a : a + n] = 0
    if kind == "empty_row":
        mask[rng.randrange(batch)] = 0
    return mask


def random_offsets(rng, length, documents):
    cuts = sorted(rng.randint(0, length) for _ in range(documents - 1))
    return torch.tensor([0, *cuts, length], dtype=torch.int32)


def random_positions(rng, batch, length):
    kind = rng.choice(["default", "default", "shared", "rows"])
    if kind == "default":
        return None
    shape = (length,) if kind == "shared" else (batch, length)
    return torch.randint(0, 40, shape)


def close(found, expected, tolerance=1e-9, what=""):
    """Absolute agreement to `tolerance` times the size of what is expected; infinities must be equal."""
    assert found.shape == expected.shape, (what, found.shape, expected.shape)
    if not found.numel():
        return
    finite = expected.isfinite()
    assert torch.equal(found[~finite].double(), expected[~finite].double()), what
    if finite.any():
        gap = float((found.double() - expected.double())[finite].abs().max())
        scale = max(1.0, float(expected[finite].abs().max()))
        assert gap <= tolerance * scale, f"{what}: differs by {gap:.3e} where values reach {scale:.3e}"
