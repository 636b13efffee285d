"""The switch between instruction sets, and kernels in company: many Python threads, fork, torch's own threads."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from hici_kernels import _native, attention, global_stats

PATHS = list(_native.paths())
each_path = pytest.mark.parametrize("path", PATHS)


def tensors(seed: int = 0, s: int = 500) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, s, h, 32, generator=g) for h in (4, 2, 2))
    return q, k, v


def both_ways(seed: int = 0) -> list[Tensor]:
    """out, lse and gradients: enough work to ask for several threads."""
    leaves = [x.requires_grad_() for x in tensors(seed)]
    out, lse = attention(*leaves, segment_len=200, recurrence_len=30, return_lse=True, impl="cpu")
    return [out.detach(), lse.detach(), *torch.autograd.grad(out.square().sum() + lse.sum(), leaves)]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_paths_are_listed_slowest_first() -> None:
    assert PATHS[0] == "base"
    assert set(PATHS) <= {"base", "avx512", "avx512_bf16", "amx"}
    assert "amx" not in PATHS or PATHS[-1] == "amx"


def test_the_last_path_multiplies_bfloat16_fastest() -> None:
    """Which of two paths that is depends on the processor, and the library decides by its name: here it is measured."""

    def rate(path: str) -> float:
        number, loop = _native.paths()[path], _native.library().ceiling_loop
        work = "bfloat16" if str(_native.library().ceiling_products(number)) else "fma"
        loop(work, 1000, number, 1)
        best = 0.0
        for _ in range(20):
            began = time.perf_counter()
            flops = loop(work, 20_000, number, 1)
            best = max(best, flops / (time.perf_counter() - began))
        return best

    rates = {path: rate(path) for path in PATHS}
    assert rates[PATHS[-1]] > 0.8 * max(rates.values()), rates


def test_the_fastest_path_is_the_default() -> None:
    q, k, v = (x.bfloat16() for x in tensors())
    with _native.path(PATHS[-1]):
        forced = attention(q, k, v, impl="cpu")
    assert torch.equal(forced, attention(q, k, v, impl="cpu"))
    assert _native.execution()[0] == _native.FASTEST


@pytest.mark.skipif("avx512_bf16" not in PATHS, reason="only bfloat16 products give other bits than float ones")
def test_the_switch_reaches_the_kernel() -> None:
    q, k, v = (x.bfloat16() for x in tensors())
    results = []
    for path in ("base", "avx512_bf16"):
        with _native.path(path):
            results.append(attention(q, k, v, impl="cpu"))
    assert not torch.equal(*results)
    torch.testing.assert_close(*results, rtol=0.05, atol=0.05)


def test_paths_nest_and_end_with_an_error_inside() -> None:
    first, last = PATHS[0], PATHS[-1]
    with _native.path(first):
        with _native.path(last):
            assert _native.execution()[0] == _native.paths()[last]
        assert _native.execution()[0] == _native.paths()[first]
        with pytest.raises(ZeroDivisionError), _native.path(last):
            raise ZeroDivisionError
        assert _native.execution()[0] == _native.paths()[first]
    assert _native.execution()[0] == _native.FASTEST


@pytest.mark.parametrize("name", ["sse2", "", "AVX512", None, 0])
def test_an_unknown_path_is_refused(name: object) -> None:
    with pytest.raises(ValueError, match="name must be one of 'base'"), _native.path(name):  # type: ignore[arg-type]
        pass


def test_a_path_holds_for_its_own_thread() -> None:
    inside = []
    with _native.path("base"):
        thread = threading.Thread(target=lambda: inside.append(_native.execution()[0]))
        thread.start()
        thread.join()
    assert inside == [_native.FASTEST]


@pytest.mark.parametrize("number", [-2, 99, 2**40])
def test_the_library_refuses_a_path_it_lacks(number: int) -> None:
    x = torch.randn(1, 4, 1, 8)
    out, lse = torch.empty_like(x), torch.empty(1, 1, 4)
    rest = (0, 0, None, None, None, None, None, None, None, True, 1.0, out, lse)
    with pytest.raises(ValueError, match="path must be -1 or a number"):
        _native.library().attention_forward(x, x, x, *rest, number, 1)
    with pytest.raises(ValueError, match="threads must be 1 to 65536"):
        _native.library().attention_forward(x, x, x, *rest, -1, 0)


@each_path
def test_the_number_of_threads_is_torchs(path: str) -> None:
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        assert _native.execution()[1] == count
    torch.set_num_threads(1)
    with _native.path(path):
        wanted = both_ways()
        for count in (2, 3, 7, 64):
            torch.set_num_threads(count)
            assert same(both_ways(), wanted)


def test_many_python_threads_get_the_bits_of_one() -> None:
    torch.set_num_threads(2)
    wanted = [both_ways(seed) for seed in range(4)]
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda i: both_ways(i % 4), range(48)))
    assert all(same(x, wanted[i % 4]) for i, x in enumerate(found))


def test_many_python_threads_on_different_paths() -> None:
    torch.set_num_threads(2)

    def on(path: str) -> list[Tensor]:
        with _native.path(path):
            return both_ways()

    wanted = {path: on(path) for path in PATHS}
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda i: on(PATHS[i % len(PATHS)]), range(24)))
    assert all(same(x, wanted[PATHS[i % len(PATHS)]]) for i, x in enumerate(found))


def test_torch_operations_between_ours() -> None:
    torch.set_num_threads(3)
    a, x = torch.randn(300, 300), torch.randn(1, 40, 8, 512)
    wanted = both_ways(), a @ a, global_stats(x, causal=True, impl="cpu")
    for _ in range(20):
        assert torch.equal(a @ a, wanted[1]) and same(both_ways(), wanted[0])
        torch.nn.functional.scaled_dot_product_attention(*(y.transpose(1, 2) for y in tensors()[:1] * 3))
        assert torch.equal(global_stats(x, causal=True, impl="cpu"), wanted[2])


FORK = """
import os, sys, torch
from hici_kernels import attention
torch.set_num_threads({threads})
q, k, v = (torch.randn(1, 600, h, 32, generator=torch.Generator().manual_seed(h)) for h in (4, 2, 2))
def run():
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = attention(*leaves, segment_len=200, impl="cpu")
    return [out.detach(), *torch.autograd.grad(out.sum(), leaves)]
before = run() if {used} else None
child = os.fork()
if child == 0:
    torch.set_num_threads({child_threads})
    {child}
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, "the child failed"
after = run()
assert before is None or all(torch.equal(a, b) for a, b in zip(before, after))
"""


def in_a_process(source: str) -> None:
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.parametrize(
    "used, threads, child_threads",
    [(False, 3, 3), (True, 1, 3), (True, 3, 1), (True, 3, 3)],
    ids=["before the first call", "after calls on one thread", "to a child with one thread", "after calls on many"],
)
def test_after_fork(used: bool, threads: int, child_threads: int) -> None:
    """A child has none of the OpenMP threads its parent has used; torch's own parallel operations hang there."""
    child = "run()"
    if used:
        # compared as bytes: torch.equal may ask for threads. Forward alone: torch refuses autograd in such a child
        child = (
            "out = attention(q, k, v, segment_len=200, impl='cpu'); "
            "assert before[0].numpy().tobytes() == out.numpy().tobytes()"
        )
    in_a_process(FORK.format(threads=threads, used=used, child_threads=child_threads, child=child))


def test_a_process_that_starts_with_many_threads_and_ends() -> None:
    """Threads that wait for work when the interpreter ends must not keep it."""
    source = "import torch; torch.set_num_threads(5)\n" + "from hici_kernels import attention\n"
    in_a_process(source + "x = torch.randn(1, 900, 4, 32)\nattention(x, x, x, impl='cpu'); x @ x.transpose(2, 3)")
