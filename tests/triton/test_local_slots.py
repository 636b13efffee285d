"""local_slots' kernels under Triton's interpreter: results against float64, and what must not matter."""

import mmap
import random
from unittest import mock

import numpy as np
import pytest
import torch
from far_programs import only_ends
from hici_oracle import local_slots as oracle

from hici_kernels import local_slots, segments
from hici_kernels.errors import ImplError
from hici_kernels.ops.local_slots import triton as launch
from hici_kernels.ops.local_slots.triton_cut import cut_packed
from hici_kernels.testing import assert_usually_within, excess
from hici_kernels.tuning.lookup import trial

pytest.importorskip("triton.language")

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
INPUTS = ("hidden", "slot_queries", "k_weight", "v_weight")
BLOCKS = {"BLOCK_S": 16, "BLOCK_H": 32, "num_warps": 4, "num_stages": 1}


class Case:
    """Tensors and options of one call; ``masked`` 2: a whole segment has no token."""

    def __init__(self, b, s, h, m, heads, d, segment_len, *, masked=0, cu=None, empty="zero", dtype=F32, seed=0):
        g = torch.Generator().manual_seed(seed)
        shapes = (b, s, h), (m, heads * d), (heads * d, h), (heads * d, h)
        self.tensors = [torch.randn(x, generator=g) for x in shapes]
        # scores of order 1: rounding a score of 10 alone, in any form of the product, costs 10 eps of its weight
        self.tensors[1] *= 0.5
        self.tensors[2] *= h**-0.5
        self.tensors = [x.to(dtype) for x in self.tensors]
        mask = None
        if masked:
            mask = torch.rand(b, s, generator=g) < 0.6
            if masked == 2:
                mask[0, : segment_len or s] = False
        self.options = {
            "num_heads": heads,
            "segment_len": segment_len,
            "attention_mask": mask,
            "cu_seqlens": None if cu is None else torch.tensor(cu, dtype=torch.int32),
            "empty": empty,
        }
        self.grad = torch.randn(oracle(*self.wide(), **self.options).shape, generator=g).to(dtype)

    def wide(self):
        return [x.double() for x in self.tensors]

    def run(self, tensors=None, **changes):
        """(out, gradients) of the kernels."""
        return differentiate(
            local_slots, self.tensors if tensors is None else tensors, self.options | changes, self.grad, impl="triton"
        )

    def ratios(self):
        """(out, gradients) and the error of each over its budget, by name."""
        found, grads = self.run()
        expected, wanted = differentiate(oracle, self.wide(), self.options, self.grad.double())
        plain, plain_grads = differentiate(oracle, self.tensors, self.options, self.grad)
        assert found.dtype == self.tensors[0].dtype
        results = zip((expected, *wanted), (found, *grads), (plain, *plain_grads), ("slots", *INPUTS), strict=True)
        return found, grads, {name: excess(truth, plainly, result) for truth, result, plainly, name in results}

    def check(self):
        found, grads, over = self.ratios()
        assert max(over.values()) <= 1, f"error / budget: {over}"
        return found, grads


def differentiate(function, tensors, options, grad, **more):
    leaves = [x.detach().requires_grad_() for x in tensors]
    out = function(*leaves, **options, **more)
    if not out.requires_grad:  # the loops found no token at all
        return out, tuple(torch.zeros_like(x) for x in tensors)
    return out.detach(), torch.autograd.grad(out, leaves, grad.to(out.dtype), allow_unused=True, materialize_grads=True)


def same(one, other):
    assert torch.equal(one[0], other[0])
    for name, x, y in zip(INPUTS, one[1], other[1], strict=True):
        assert torch.equal(x, y), name


@pytest.fixture(autouse=True)
def small_tiles():
    with trial("local_slots", BLOCKS), trial("local_slots_backward", BLOCKS):
        yield


CASES = {
    # 40 = 16 + 16 + 8 tokens a segment, the last one short; 48 channels are one and a half blocks
    "ragged": (1, 70, 48, 8, 2, 8, 40),
    "masked": (2, 37, 33, 3, 2, 5, 20),
    "several splits": (1, 150, 32, 4, 2, 16, None),
    "packed": (1, 70, 32, 5, 2, 16, 20),
    "more slots than channels of a head": (1, 70, 32, 20, 2, 3, 20),
    "several blocks of rows": (1, 20, 32, 20, 4, 24, None),
}
MORE = {
    "masked": {"masked": 2, "empty": "uniform"},
    "packed": {"masked": 2, "empty": "uniform", "cu": [0, 3, 3, 40, 70]},
    "several splits": {"masked": 1},
    "more slots than channels of a head": {"masked": 2, "empty": "uniform", "cu": [0, 3, 3, 40, 70]},
}


@pytest.mark.parametrize("name", CASES)
def test_float32(name):
    Case(*CASES[name], **MORE.get(name, {})).check()


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("name", ["ragged", "more slots than channels of a head"])
def test_low_precision(name, dtype):
    Case(*CASES[name], **MORE.get(name, {}), dtype=dtype).check()


def test_cases_are_cut_as_their_names_say():
    def problem(name):
        case = Case(*CASES[name], **MORE.get(name, {}))
        o = case.options
        total = case.grad.shape[1]
        rest = (o["num_heads"], o["segment_len"] or 0, total, o["attention_mask"], o["cu_seqlens"], o["empty"])
        return launch.Problem("local_slots", *case.tensors, *rest)

    assert problem("several splits").cut.splits == 2 and problem("several splits").absorbed
    assert problem("several blocks of rows").row_blocks == 2 and problem("several blocks of rows").absorbed
    assert not problem("more slots than channels of a head").absorbed
    assert problem("packed").cut.packed and not problem("masked").cut.packed


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("name", CASES)
def test_low_precision_everywhere(name, dtype):
    Case(*CASES[name], **MORE.get(name, {}), dtype=dtype, seed=1).check()


def random_case(seed, draw):
    """A shape by ``seed``, values by ``draw``."""
    rng = random.Random(seed)
    packed = rng.random() < 0.5
    s = rng.randint(1, 90)
    cu = sorted([0, s, *(rng.randint(0, s) for _ in range(3))]) if packed else None
    return Case(
        1 if packed else rng.randint(1, 2),
        s,
        rng.randint(1, 70),
        rng.randint(1, 9),
        rng.randint(1, 4),
        rng.choice([1, 3, 8, 16]),
        rng.choice([None, 1, 7, 16, 33]),
        masked=rng.choice([0, 1, 2]),
        cu=cu,
        empty=rng.choice(["zero", "uniform"]),
        dtype=rng.choice([F32, BF16, F16]),
        seed=1000 * draw + seed,
    )


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12))
def test_random_shapes(seed):
    """In the usual draw: of the few numbers of a tiny shape the plain computation's largest error may be lucky."""
    assert_usually_within(lambda i: random_case(seed, i).ratios()[2], f"seed {seed}")


@pytest.mark.parametrize("absorbed", [True, False])
def test_both_forms_give_the_same(absorbed):
    # each of them where the rule would take the other
    case = Case(2, 37, 33, *((12, 2, 3) if absorbed else (3, 2, 8)), 20, masked=2, empty="uniform")
    shape = (2 * 37, 4, case.tensors[1].shape[0], 2, case.tensors[1].shape[1], 33, 4)
    with mock.patch.object(launch, "FLOPS_PER_BYTE", 0):
        assert launch.absorbs(*shape) != absorbed
    with mock.patch.object(launch, "absorbs", lambda *_: absorbed):
        case.check()


def test_the_cheaper_form():
    # tokens, segments, slots, heads, E, H, bytes
    assert launch.absorbs(16384, 4, 8, 8, 512, 4096, 2)  # the published layers
    assert launch.absorbs(49152, 4, 8, 32, 512, 4096, 2)
    assert launch.absorbs(16384, 4, 8, 32, 4096, 4096, 2)
    assert not launch.absorbs(16384, 4, 128, 32, 512, 4096, 2)  # 4096 rows against 512
    assert not launch.absorbs(16384, 4096, 8, 8, 512, 4096, 2)  # 4 tokens a segment: averages outweigh them


@pytest.mark.parametrize("absorbed", [True, False])
@pytest.mark.parametrize("empty", ["zero", "uniform"])
def test_masked_columns_and_scratch_may_hold_anything(absorbed, empty):
    case = Case(1, 37, 20, 3, 2, 8, 16, masked=1, cu=[0, 21, 21, 37], empty=empty)
    mask = case.options["attention_mask"]
    mask[0, 32:] = True
    dirty = [case.tensors[0].masked_fill(~mask[..., None], torch.nan), *case.tensors[1:]]
    with mock.patch.object(launch, "absorbs", lambda *_: absorbed):
        clean = case.run()
        new_empty, empty_like = torch.Tensor.new_empty, torch.empty_like

        def filled(x):
            return x.fill_(torch.nan) if x.is_floating_point() else x.fill_(-1)

        with (
            mock.patch.object(torch.Tensor, "new_empty", lambda *a, **k: filled(new_empty(*a, **k))),
            mock.patch.object(torch, "empty_like", lambda *a, **k: filled(empty_like(*a, **k))),
        ):
            poisoned = case.run(dirty)
    same(clean, poisoned)
    assert not poisoned[1][0][~mask].any() and poisoned[1][0][mask].any()


def test_same_bits_every_time_and_for_any_strides():
    case = Case(2, 37, 32, 3, 2, 8, 20, masked=1, dtype=BF16)
    first = case.run()
    same(first, case.run())
    hidden, *rest = case.tensors
    swapped = hidden.transpose(0, 1).contiguous().transpose(0, 1)
    inner = torch.nn.functional.pad(hidden, (5, 3), value=torch.nan)[..., 5:37]
    columns = [rest[0], *(w.T.contiguous().T for w in rest[1:])]
    for view, weights in ((swapped, rest), (inner, columns)):
        same(first, case.run([view, *weights]))


def test_a_segment_without_tokens():
    for absorbed in (True, False):
        with mock.patch.object(launch, "absorbs", lambda *_, a=absorbed: a):
            case = Case(1, 24, 16, 3, 2, 8, 8, masked=1)
            case.options["attention_mask"][0, 8:16] = False
            out, grads = case.run()
            assert not out[0, 1].any() and out[0, 0].any() and not grads[0][0, 8:16].any()
            out, grads = case.run(empty="uniform")
            mean = case.tensors[0][0, 8:16].mean(0) @ case.tensors[3].T
            torch.testing.assert_close(out[0, 1], mean.expand(3, -1), rtol=0, atol=1e-5)
            assert grads[0][0, 8:16].any()


@pytest.mark.parametrize(("b", "s", "n", "cu"), [(0, 5, 3, None), (2, 0, 0, None), (1, 0, 0, [0, 0]), (1, 0, 0, [0])])
def test_empty_shapes(b, s, n, cu):
    case = Case(b, s, 16, 3, 2, 4, 2, cu=cu)
    out, grads = case.run()
    assert out.shape == (b, n, 3, 8)
    assert [g.shape for g in grads] == [x.shape for x in case.tensors] and not any(g.any() for g in grads)


def test_float16_keeps_folded_queries_in_range():
    case = Case(1, 24, 16, 2, 1, 8, None, dtype=F16)
    case.tensors[0] *= 1e-3
    case.tensors[1] = (case.tensors[1].abs() + 1) * 64
    case.tensors[2] = (case.tensors[2].abs() + 1) * 128
    folded = case.tensors[1].double() @ case.tensors[2].double()
    assert folded.max() > 65504
    case.check()


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_what_all_tokens_share_cancels(dtype):
    # gradients of scores are differences from a mean that here is 100 times larger than they are
    case = Case(1, 40, 32, 3, 2, 16, None, dtype=dtype)
    case.tensors[0] = (case.tensors[0] * 0.1 + torch.linspace(-10, 10, 32)).to(dtype)
    case.check()


def test_offsets_beyond_32_bits():
    stride = 2**27
    # Linux's MAP_NORESERVE, which Python names from 3.13 on: pages that are not touched cost nothing
    memory = mmap.mmap(-1, 37 * stride * 2, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)
    far = torch.from_numpy(np.frombuffer(memory, dtype=np.float16)).as_strided((1, 37, 16), (0, stride, 1))
    case = Case(1, 37, 16, 3, 2, 8, 20, dtype=F16)
    far.copy_(case.tensors[0])
    same(case.run(), case.run([far, *case.tensors[1:]]))


@pytest.mark.slow
def test_scratch_and_results_beyond_32_bits():
    """The last 5 tokens of 2^27, a segment of their own: weights of all take 2^32 elements."""
    near = Case(1, 5, 16, 8, 4, 4, 128, dtype=F16)
    near.tensors[0] += 1
    s, n = 2**27 + 5, 2**20 + 1
    far = torch.empty(1, s, 16, dtype=F16)
    far[:, -5:] = near.tensors[0]
    grad = torch.zeros(1, n, 8, 16, dtype=F16)
    grad[:, -1:] = near.grad

    def run(hidden, total, grad):
        arguments = (hidden, *near.tensors[1:], 4, 128, total, None, None, "zero")
        cut = launch.Problem("local_slots", *arguments).cut
        return launch.forward(*arguments), launch.backward(grad, *arguments)[0], cut.tiles * 32 * cut.block

    with mock.patch.object(launch, "absorbs", lambda *_: True):
        out, dx, _ = run(near.tensors[0], 1, near.grad)
        with only_ends():
            far_out, far_dx, weights = run(far, n, grad)
    assert min(weights, far.numel()) > 2**31
    assert out.any() and torch.equal(far_out[:, -1:], out)
    assert dx.any() and torch.equal(far_dx[:, -5:], dx)


@pytest.mark.parametrize("seed", range(5))
def test_tables_of_packed_documents(seed):
    g = torch.Generator().manual_seed(seed)
    length, step, block, tiles = 60, [None, 1, 7, 16, 100][seed], 4, 2
    inner = torch.randint(0, length + 1, (6,), generator=g).sort().values.tolist()
    cu = torch.tensor([0, *inner, length], dtype=torch.int32)
    spans = segments.spans(length, step, cu)
    cut = cut_packed(cu, length, len(spans), step or 0, block, tiles)
    assert [(a, b) for a, b in zip(cut.start.tolist(), cut.stop.tolist(), strict=True)] == [x[:2] for x in spans]
    found = {i: [] for i in range(len(spans))}
    for i, a, b in cut.tile_table.tolist():
        assert b - a <= block
        found[i] += range(a, b)
    assert [found[i] for i in range(len(spans))] == [list(range(a, b)) for a, b, _ in spans]
    tile_starts = cut.tile_table[:, 1].tolist()
    covered = 0
    for i, a, b, tile in cut.split_table.tolist():
        if a < b:
            assert spans[i].start <= a and b <= spans[i].stop and tile_starts[tile] == a and b - a <= block * tiles
            covered += b - a
    assert covered == length
    assert cut.first_tile.tolist()[-1] <= cut.tiles and cut.first_split.tolist()[-1] <= cut.splits


def test_wrong_offsets_reach_no_foreign_memory():
    cu = torch.tensor([0, 50, 20, 10**9], dtype=torch.int32)
    for total in (1, 5, 40):
        cut = cut_packed(cu, 30, total, 4, 4, 2)
        for table in (cut.tile_table, cut.split_table):
            _, start, stop = table[:, :3].unbind(1)
            assert (start >= 0).all() and (stop <= 30).all()


def test_what_it_does_not_serve_it_says():
    case = Case(1, 8, 16, 2, 1, 4, None)
    with pytest.raises(ImplError, match=r"hidden is torch\.float64"):
        local_slots(*case.wide(), num_heads=1, impl="triton")
    hidden = case.tensors[0].mT.contiguous().mT
    with pytest.raises(ImplError, match="contiguous in its last dimension"):
        local_slots(hidden, *case.tensors[1:], num_heads=1, impl="triton")
