"""What ``import hici_kernels`` needs, gives and costs; each case in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

OPTIONAL = ("triton", "transformers", "einops", "tvm_ffi", "matplotlib", "typer")

BLOCKER = f"""
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {OPTIONAL!r}:
            raise ModuleNotFoundError(f"{{name}} is blocked", name=name)

# torch itself may probe for some of these: only what the package asks for is of interest
import torch
for name in [n for n in sys.modules if n.split(".")[0] in {OPTIONAL!r}]:
    del sys.modules[name]
sys.meta_path.insert(0, Blocked())
"""


def python(code: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done


def test_needs_torch_only() -> None:
    python(BLOCKER + "import hici_kernels, hici_kernels.nn, hici_kernels.ops, hici_kernels.kv")


def test_an_operation_runs_without_the_optional_packages() -> None:
    code = """
import hici_kernels as hk, torch
from hici_kernels.ops.global_stats import global_stats
x = torch.randn(1, 2, 3, 4)
assert torch.equal(global_stats(x), global_stats(x, impl="reference"))
try:
    global_stats(x, impl="cpu")
except hk.ImplError as error:
    assert "cannot serve global_stats" in str(error), error
else:
    raise SystemExit("the native library was used without apache-tvm-ffi")
"""
    python(BLOCKER + code)


def test_import_loads_no_native_code() -> None:
    code = """
import sys, torch
before = set(sys.modules)
import hici_kernels
added = {n.split(".")[0] for n in set(sys.modules) - before}
assert not added & {"triton", "flash_attn", "tvm_ffi", "matplotlib", "typer", "transformers", "einops", "rich"}, added
maps = open("/proc/self/maps").read() if sys.platform == "linux" else ""
assert "libhici_native" not in maps
"""
    python(code)


def test_two_names_one_module() -> None:
    code = """
import hici, hici_kernels
assert hici is hici_kernels
import hici.nn, hici_kernels.nn
assert hici.nn is hici_kernels.nn and sys.modules["hici.nn"] is hici_kernels.nn
from hici.ops.global_stats.reference import global_stats as a
from hici_kernels.ops.global_stats.reference import global_stats as b
assert a is b
"""
    python("import sys\n" + code)
    python("import sys\nimport hici_kernels.nn\n" + code)


def test_an_import_by_the_other_name_binds_nothing_anew() -> None:
    """Packages have functions of the names of their modules: ops.attention, checkpoints.extract, train.run."""
    code = """
import importlib, pkgutil, sys
import hici, hici_kernels
names = [m.name for m in pkgutil.walk_packages(hici_kernels.__path__, "hici_kernels.")]
loaded = []
for name in names:
    if name.endswith("__main__") or "libhici" in name:
        continue
    if real_first:
        try:
            importlib.import_module(name)
        except ImportError:  # an optional package is missing
            continue
    loaded.append(name)
before = {n: dict(vars(sys.modules[n])) for n in loaded} if real_first else {}
for name in loaded:
    try:
        module = importlib.import_module("hici" + name.removeprefix("hici_kernels"))
    except ImportError:
        continue
    assert module is importlib.import_module(name) and module.__spec__.name == name, name
for name, held in before.items():
    assert all(vars(sys.modules[name])[key] is value for key, value in held.items()), name
from hici.ops.attention import attention
from hici_kernels.checkpoints import extract
assert attention is hici_kernels.ops.attention is hici_kernels.attention
assert callable(hici_kernels.ops.attention) and callable(extract)
"""
    for real_first in (True, False):
        python(f"real_first = {real_first}\n" + code)


def test_either_name_runs_as_a_command() -> None:
    for module in ("hici", "hici_kernels", "hici.cli.main"):
        done = subprocess.run(
            [sys.executable, "-W", "error::RuntimeWarning", "-m", module, "info"],
            text=True, capture_output=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0 and done.stdout.startswith("hici-kernels"), done.stderr


def test_runpy_runs_a_copy_and_leaves_the_module() -> None:
    code = """
import inspect, runpy, sys
names = runpy.run_module("hici.cli.main")
assert names["__name__"] == "hici.cli.main" and names["__file__"].endswith("main.py"), names["__file__"]
import hici.cli.main, hici_kernels.cli.main
assert hici.cli.main is hici_kernels.cli.main and hici.cli.main.app is not names["app"]
assert hici.cli.main.__spec__.name == "hici_kernels.cli.main"
sys.argv = ["hici", "--help"]
try:
    runpy.run_module("hici", run_name="__main__")
except SystemExit as done:
    assert not done.code
else:
    raise SystemExit("the command did not end")
import hici.nn, hici_kernels.nn
assert hici.nn is hici_kernels.nn and "class _Config" in inspect.getsource(sys.modules["hici_kernels.config"])
loader = next(f for f in sys.meta_path if type(f).__name__ == "_Alias")
assert loader.get_filename("hici.config") == sys.modules["hici_kernels.config"].__file__
assert loader.is_package("hici.nn") and "class _Config" in loader.get_source("hici.config")
"""
    python(code)


def test_works_from_any_directory(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import hici_kernels; print(hici_kernels.__version__)"],
        cwd=tmp_path, text=True, capture_output=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_import_adds_little_to_torch() -> None:
    # processor time, the least of several: what else runs on the machine is no cost of the import
    code = """
import time, torch
begin = time.process_time()
import hici_kernels
print(time.process_time() - begin)
"""
    assert min(float(python(code).stdout) for _ in range(5)) < 0.3
