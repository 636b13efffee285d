"""What ahead-of-time compilation sees of slots, statistics and HGA: every kernel they launch, in every form of it."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import hici_kernels

pytest.importorskip("triton.language")

# operation -> how many kernels it launches at least
OPS = {"local_slots": 7, "global_stats": 7, "hga_summaries": 1, "hga_route": 3, "hga_attention": 9, "gather_rows": 1}
# compiled in one dtype, which stands for all
ONE_DTYPE = {"route_runs", "gather"}
# recording takes the launch of kernels out of the whole process
RECORD = """
import json, sys
from hici_kernels import tuning
from hici_kernels.aot.plan import declared
found = []
for op in sys.argv[1:]:
    for table in {op, op + "_backward", op + "_backward_dq"} & set(tuning.tables()):
        for entry in tuning.read(table):
            if entry.arch in ("sm_90", "gfx942"):
                for s in declared(f"hici_kernels.ops.{op}.triton", entry):
                    flags = {k: v for k, v in s.constexprs.items() if k.isupper()}
                    found.append([op, s.kernel.fn.__name__, entry.arch, entry.dtype, flags])
json.dump(found, sys.stdout)
"""


@pytest.fixture(scope="module")
def recorded() -> list:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", RECORD, *OPS], capture_output=True, text=True, env=environment, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def launched(op: str) -> set[str]:
    """Names in ``name[grid](...)`` of an implementation's source."""
    sources = (Path(hici_kernels.__file__).parent / "ops" / op).glob("triton*.py")
    trees = [ast.parse(source.read_text(encoding="utf-8")) for source in sources]
    calls = [n for tree in trees for n in ast.walk(tree) if isinstance(n, ast.Call)]
    names = [c.func.value for c in calls if isinstance(c.func, ast.Subscript)]
    return {n.id for n in names if isinstance(n, ast.Name)}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("arch", ["sm_90", "gfx942"])
def test_every_kernel_that_is_launched(recorded: list, op: str, arch: str) -> None:
    expected = launched(op)
    assert len(expected) >= OPS[op]
    assert {kernel for o, kernel, a, *_ in recorded if (o, a) == (op, arch)} == expected


@pytest.mark.parametrize(
    ("kernel", "flags"),
    [
        *((k, {"PACKED", "HAS_MASK", "UNIFORM"}) for k in ("score_tiles", "average_splits", "accumulate_splits")),
        ("score_gradients", {"PACKED", "HAS_MASK", "UNIFORM", "SAME"}),
        ("hidden_gradients", {"PACKED", "SAME", "ONE_BLOCK"}),
        ("weight_gradients", {"PACKED", "UNIFORM"}),
        ("merge_sums", {"PACKED", "BOTH"}),
        ("segment_totals", {"PACKED"}),
        ("merge_splits", {"PACKED"}),
        ("project_splits", {"PACKED"}),
        ("shared_stats", {"PACKED", "VALID", "FINAL", "INDICES"}),
        ("causal_stats", {"PACKED", "VALID", "EMIT", "CARRY", "INDICES"}),
        ("carry_stats", {"PACKED", "INDICES"}),
        ("shared_gradients", {"PACKED", "VALID"}),
        ("causal_gradients", {"PACKED", "VALID"}),
        ("scan_chunks", {"SHARED"}),
        ("pick_groups", {"SHARED", "PREVIOUS"}),
        ("route_runs", {"SHARED", "PREVIOUS", "BLOCK_RULE"}),
        ("near_keys", {"SINKS"}),
        ("gather", {"ALIGNED"}),
    ],
)
def test_every_form_of_a_kernel(recorded: list, kernel: str, flags: set[str]) -> None:
    # two operations have a kernel of this name
    found = [f for o, k, *_, f in recorded if k == kernel and (k != "merge_splits" or o == "local_slots")]
    for flag in flags:
        values = {f[flag] for f in found}
        assert values == ({"stats", "gradient", "piece"} if flag == "EMIT" else {False, True}), flag


def test_every_dtype(recorded: list) -> None:
    for op in OPS:
        kernels = {k for o, k, *_ in recorded if o == op} - ONE_DTYPE
        for dtype in ("bfloat16", "float32"):
            found = {k for o, k, _, d, _ in recorded if (o, d) == (op, dtype)}
            assert found - ONE_DTYPE == kernels, (op, dtype)
