"""Attention over page addresses: what a cache calls."""

from __future__ import annotations

import pytest
import torch
from hga_cases import full, rope, small, tensors
from torch import Tensor

from hici_kernels import HGAConfig, _native
from hici_kernels.ops.hga_attention.op import attention_forward
from hici_kernels.ops.hga_attention.pages import pages_attention
from hici_kernels.ops.hga_route.api import budgets
from hici_kernels.ops.hga_route.reference import regions
from hici_kernels.testing import budget, error

PATHS = list(_native.paths())
pytestmark = pytest.mark.skipif(not PATHS, reason=str(_native.status()))
NAN = float("nan")


def pages_of(
    k: Tensor, v: Tensor, routes: Tensor, positions: Tensor, config: HGAConfig, shuffle: int, *, token_major: bool
) -> tuple[dict[str, Tensor | int], list[Tensor]]:
    """Arguments of pages_attention for a call of hga_attention, every page in memory of its own; and that memory.

    Only what some query sees is there: everything else is NaN.
    """
    b, s, hkv, d = k.shape
    t, hq = routes.shape[1:3]
    c, m, r = config.chunk_size, config.groups_per_chunk, hq // hkv
    g = torch.Generator().manual_seed(shuffle)
    lists: dict[str, list] = {n: [] for n in ("k_pages", "v_pages", "starts", "visible")}
    memory, offsets = [], [0]
    for row in range(b):
        p = positions[row]
        region = regions(p, c, config.keep_first, config.keep_last)
        for head in range(hkv):
            masks: dict[int, Tensor] = {}
            for i in range(t):
                if p[i] < 0:
                    continue
                near = [*range(int(region.f[i])), *range(int(region.l[i]), int(region.n[i]) + 1)]
                for h in range(r):
                    for x in near:
                        masks.setdefault(x, torch.zeros(t, r, dtype=torch.int64))[i, h] = (1 << m) - 1
                    for x in routes[row, i, head * r + h].tolist():
                        if x >= 0:
                            masks.setdefault(x // m, torch.zeros(t, r, dtype=torch.int64))[i, h] |= 1 << (x % m)
            chunks = list(masks)
            for at in torch.randperm(len(chunks), generator=g).tolist():
                x = chunks[at]
                shape = (c, 3, d) if token_major else (c, d)
                page = [torch.full(shape, NAN, dtype=k.dtype) for _ in "kv"]
                seen = torch.zeros(c, dtype=torch.bool)
                for bit in range(m):
                    if (masks[x] >> bit & 1).any():
                        seen[bit * config.group_size : (bit + 1) * config.group_size] = True
                seen &= x * c + torch.arange(c) <= p.max()
                for to, source in zip(page, (k, v), strict=True):
                    into = to[:, 1] if token_major else to
                    into[seen] = source[row, x * c : min(s, x * c + c), head][seen[: min(s, x * c + c) - x * c]]
                    memory.append(to)
                skip = d if token_major else 0
                for name, to in zip(("k_pages", "v_pages"), page, strict=True):
                    lists[name].append(to.data_ptr() + skip * to.element_size())
                lists["starts"].append(x * c)
                lists["visible"].append(masks[x])
            offsets.append(len(lists["starts"]))
    found: dict[str, Tensor | int] = {
        n: torch.tensor(lists[n], dtype=torch.int64) for n in ("k_pages", "v_pages", "starts")
    }
    found["visible"] = torch.stack(lists["visible"]) if lists["visible"] else torch.zeros(0, t, r, dtype=torch.int64)
    stride = 3 * d if token_major else d
    found |= {"offsets": torch.tensor(offsets), "positions": positions, "kv_heads": hkv, "page_tokens": c}
    found |= {"group_size": config.group_size, "k_stride": stride, "v_stride": stride}
    return found, memory


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("t", [1, 2, 5, 60])
@pytest.mark.parametrize("token_major", [False, True])
def test_pages_equal_the_operation(path: str, dtype: torch.dtype, t: int, token_major: bool) -> None:
    config = small(topk_chunks=4, topk_groups=6)
    q, k, v = tensors(220, t=t, b=2, hq=8, hkv=2, d=40, seed=t, dtype=dtype)
    positions = torch.arange(220 - t, 220).expand(2, t).clone()
    positions[1, 0] = -1  # sees nothing
    with _native.path(path):
        want = full(q, k, v, config, positions=positions, rope=rope(40), impl="cpu")
        given, memory = pages_of(k, v, want.routes, positions, config, t, token_major=token_major)
        out, lse = pages_attention(q, **given)
        narrow = given | {"visible": given["visible"].to(torch.uint8)}
        assert all(torch.equal(x, y) for x, y in zip((out, lse), pages_attention(q, **narrow), strict=True))
    rest = (rope(40).inv_freq, positions, None, want.routes, config.group_size, *budgets(config), 40**-0.5, "reference")
    truth = attention_forward(*(x.double() for x in (q, k, v)), *rest)
    plain = attention_forward(q, k, v, *rest)
    for x, y, z in zip(truth, plain, (out, lse), strict=False):
        assert error(x, z) <= budget(x, y, z.dtype)
    assert not out[1, 0].any() and (lse[1, :, 0] == -torch.inf).all()
    assert memory


def test_bits_do_not_depend_on_threads() -> None:
    config = HGAConfig(keep_first=1, keep_last=2, topk_chunks=8, topk_groups=16)
    before = torch.get_num_threads()
    for t in (1, 40):
        q, k, v = tensors(4000, t=t, b=2, hq=8, hkv=2, d=64, dtype=torch.bfloat16)
        positions = torch.arange(4000 - t, 4000).expand(2, t)
        routes = full(q, k, v, config, rope=rope(64)).routes
        given, memory = pages_of(k, v, routes, positions, config, 1, token_major=False)
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(pages_attention(q, **given))
        torch.set_num_threads(before)
        assert memory and all(torch.equal(x, y) for other in found[1:] for x, y in zip(found[0], other, strict=True))


def test_no_pages_and_empty_calls() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    sizes = {"kv_heads": 2, "page_tokens": 16, "group_size": 4, "k_stride": 16, "v_stride": 16}
    for b, t in ((1, 2), (0, 2), (2, 0), (1, 40)):
        given = {"starts": none, "offsets": torch.zeros(2 * b + 1, dtype=torch.int64)}
        given |= {"visible": torch.zeros(0, t, 2, dtype=torch.int64), "positions": torch.zeros(b, t, dtype=torch.int64)}
        out, lse = pages_attention(torch.ones(b, t, 4, 16), none, none, **given, **sizes)
        assert not out.any() and (lse == -torch.inf).all() and lse.shape == (b, 4, t)


def test_bad_arguments_are_named() -> None:
    config = small()
    q, k, v = tensors(60, t=1, dtype=torch.float32)
    positions = torch.tensor([[59]])
    routes = full(q, k, v, config).routes
    good, memory = pages_of(k, v, routes, positions, config, 1, token_major=False)
    pages_attention(q, **good)
    assert memory
    for name, bad, kind in (
        ("q", q.double(), TypeError),
        ("k_pages", good["k_pages"].int(), TypeError),
        ("v_pages", good["v_pages"][1:], ValueError),
        ("starts", None, TypeError),
        ("offsets", good["offsets"][1:], ValueError),
        ("offsets", good["offsets"].flip(0), ValueError),
        ("visible", good["visible"][:, :0], ValueError),
        ("visible", good["visible"].int(), TypeError),
        ("positions", torch.tensor([59]), ValueError),
        ("kv_heads", 3, ValueError),
        ("group_size", 5, ValueError),
    ):
        with pytest.raises(kind, match=name):
            pages_attention(**{"q": q, **good, name: bad})
    with pytest.raises(ValueError, match="visible must have a bit for each of 16 groups"):
        pages_attention(q, **good | {"group_size": 1, "visible": good["visible"].to(torch.uint8)})
