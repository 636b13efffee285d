"""The correctness half of the GPU suite, on a device that interprets: the small ones of its problems."""

import dataclasses

import pytest
import torch

from hici_kernels.bench import gpu_checks

pytest.importorskip("triton.language")

CPU = torch.device("cpu")
FAST = {
    ("gather_rows", "rows of 60 bytes"),
    ("gather_rows", "rows of 60 bytes found on the device"),
    ("global_stats", "odd width"),
    ("attention", "one token"),
    ("hga_summaries", "odd"),
}
SLOW = {
    ("attention", "the last 5 positions"),
    ("local_slots", "odd widths"),
    ("local_slots", "holes"),
    ("local_slots", "packed"),
    ("global_stats", "packed"),
    ("global_stats", "left out, causal"),
    ("hga_summaries", "half of the dims turn"),
    ("hga_route", "small chunks"),
    ("hga_attention", "small chunks"),
}


def problems():
    """FAST ones in every dtype, of which the fast tests take bfloat16; SLOW ones in that alone."""
    for c in gpu_checks.checks(CPU):
        key, usual = (c.op, c.name), c.dtype == torch.bfloat16 or c.op == "gather_rows"
        if key in FAST or (key in SLOW and usual):
            marks = [] if key in FAST and usual else [pytest.mark.slow]
            yield pytest.param(c, id=f"{c.op}, {c.name}, {str(c.dtype)[6:]}", marks=marks)


@pytest.mark.parametrize("problem", problems())
def test_kernels_pass(problem):
    (record,) = gpu_checks.run_check(problem, ["triton"])
    assert record["correct"] is True, record


def test_a_kernel_that_is_slightly_off_does_not():
    problem = next(c for c in gpu_checks.checks(CPU, ("global_stats",)) if c.name == "odd width")

    def call(x, impl):
        return tuple(1.03 * y for y in problem.call(x, impl))

    assert gpu_checks.run_check(dataclasses.replace(problem, call=call), ["triton"])[0]["correct"] is False


def test_a_problem_that_cannot_be_drawn_is_a_record():
    """So that the others are still checked where the device has no memory for this one."""
    problem = next(c for c in gpu_checks.checks(CPU, ("global_stats",)) if c.name == "odd width")

    def draw(number):
        raise torch.OutOfMemoryError("none left")

    records = gpu_checks.run_check(dataclasses.replace(problem, draw=draw), ["triton", "reference"])
    assert [r["correct"] for r in records] == [False, False] and "none left" in records[0]["error"]
