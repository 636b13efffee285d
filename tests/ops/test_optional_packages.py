"""Triton and flash_attn are optional: absent or unused they cost nothing, and naming them says what is missing."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

OPS = """
import sys, torch
import hici_kernels as hk
x = torch.randn(1, 8, 2, 16)
calls = {
    "attention": lambda impl: hk.attention(x, x, x, segment_len=4, impl=impl),
    "local_slots": lambda impl: hk.local_slots(x[:, :, 0], *torch.randn(3, 16, 16), num_heads=2, impl=impl),
    "global_stats": lambda impl: hk.global_stats(x, impl=impl),
}
def refusal(op, impl):
    try:
        calls[op](impl)
    except hk.ImplError as error:
        return str(error)
    raise SystemExit(f"{op}: impl={impl!r} was served")
"""

# what a process sees in which the package was never installed
ABSENT = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"triton", "flash_attn"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
import torch
for name in [n for n in sys.modules if n.split(".")[0] in {"triton", "flash_attn"}]:
    del sys.modules[name]
sys.meta_path.insert(0, Absent())
"""


def python(code: str, **variables: str) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | variables
    # whatever the machine has, these are about one without a GPU
    done = subprocess.run(
        [sys.executable, "-c", "import torch; torch.cuda.is_available = lambda: False\n" + code],
        text=True,
        capture_output=True,
        timeout=300,
        env=environment,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("interpret", [{}, {"TRITON_INTERPRET": "1"}], ids=["compiled", "interpreted"])
def test_without_triton(interpret: dict[str, str]) -> None:
    check = """
for op, call in calls.items():
    assert call(None).isfinite().all()
    text = refusal(op, "triton")
    assert f"impl='triton' cannot serve {op}" in text and "pip install 'hici-kernels[triton]'" in text, text
"""
    python(ABSENT + OPS + check, **interpret)


def test_without_flash_attn() -> None:
    python(
        ABSENT
        + OPS
        + """
text = refusal("attention", "flash_attn")
assert "pip install 'hici-kernels[flash]'" in text, text
"""
    )


def test_without_a_gpu_triton_is_not_even_imported() -> None:
    check = """
for call in calls.values():
    call(None)
assert hk._dispatch.explain("attention")["flash_attn"]
assert not {"triton", "flash_attn"} & set(sys.modules), "an optional package was imported"
"""
    python("import sys, torch\nassert 'triton' not in sys.modules\n" + OPS + check)


def test_cpu_tensors_without_the_interpreter_say_why() -> None:
    pytest.importorskip("triton")
    check = """
for op in calls:
    text = refusal(op, "triton")
    assert "there is no GPU" in text and "TRITON_INTERPRET=1" in text, text
"""
    python(OPS + check)


def test_cpu_tensors_beside_a_gpu_say_why() -> None:
    pytest.importorskip("triton")
    check = """
torch.cuda.is_available = lambda: True
for op in calls:
    assert calls[op](None).isfinite().all()
    text = refusal(op, "triton")
    assert "serves GPU tensors" in text and "interpreter" in text and "on cpu" in text, text
"""
    python(OPS + check)


def test_a_triton_that_does_not_import_is_a_reason_not_a_crash(tmp_path) -> None:
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text("raise OSError('built for something else')\n")
    check = """
for op, call in calls.items():
    assert call(None).isfinite().all()
    assert "triton does not import: built for something else" in refusal(op, "triton")
"""
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    python(OPS + check, TRITON_INTERPRET="1", PYTHONPATH=path)
