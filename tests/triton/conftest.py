"""Kernels under Triton's interpreter, in processes of their own.

Whether a kernel is interpreted is decided when Triton is imported, for the whole process. So unless TRITON_INTERPRET=1
is set already, every file of this folder that needs the interpreter (all but those in COMPILED) is collected as two
items, its fast and its slow tests, each of which runs pytest on the file in a process with the variable set. Nothing
of it reaches the tests of other folders. To see the tests one by one, or to choose among them:

    TRITON_INTERPRET=1 pytest tests/triton/test_attention_forward.py -k causal
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

COMPILED = ("test_aot.py", "test_aot_coverage.py")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
FOLDER = Path(__file__).parent
NO_TESTS = 5

# helpers of this folder, and the oracles of the others
for folder in (FOLDER, FOLDER.parent / "hici", FOLDER.parent / "stats", FOLDER.parent / "hga"):
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


class InterpretedFile(pytest.File):
    def collect(self) -> Iterator[pytest.Item]:
        yield InterpretedItem.from_parent(self, name="interpreted", expression="not slow")
        slow = InterpretedItem.from_parent(self, name="interpreted_slow", expression="slow")
        slow.add_marker(pytest.mark.slow)
        yield slow


class InterpretedItem(pytest.Item):
    def __init__(self, *, expression: str, **rest) -> None:
        super().__init__(**rest)
        self.expression = expression

    def runtest(self) -> None:
        if importlib.util.find_spec("triton") is None:
            pytest.skip("triton is not installed")
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", self.expression]
        done = subprocess.run(
            [*command, str(self.path)],
            capture_output=True,
            text=True,
            env={**os.environ, "TRITON_INTERPRET": "1"},
            cwd=self.config.rootpath,
        )
        if done.returncode not in (0, NO_TESTS):
            raise Failed(done.stdout[-20000:] + done.stderr[-4000:])
        if done.returncode == NO_TESTS and self.expression == "not slow":
            raise Failed(f"no fast test was found in {self.path.name}\n" + done.stdout[-2000:])

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException]) -> str:
        return str(excinfo.value) if isinstance(excinfo.value, Failed) else str(super().repr_failure(excinfo))

    def reportinfo(self) -> tuple[Path, int, str]:
        return self.path, 0, f"{self.path.name} under the interpreter: {self.expression}"


class Failed(Exception):
    """The other process's report."""


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    if INTERPRETED or file_path.parent != FOLDER or not _needs_interpreter(file_path):
        return None
    return InterpretedFile.from_parent(parent, path=file_path)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    if INTERPRETED or module_path.parent != FOLDER or not _needs_interpreter(module_path):
        return None
    # the same file as a module: nothing in this process, its import alone would import Triton
    return Empty.from_parent(parent, path=module_path)


class Empty(pytest.File):
    def collect(self) -> list[pytest.Item]:
        return []


def _needs_interpreter(path: Path) -> bool:
    return path.name.startswith("test_") and path.suffix == ".py" and path.name not in COMPILED


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True, scope="module")
def quick_interpreter() -> Iterator[None]:
    if not INTERPRETED or importlib.util.find_spec("triton") is None:
        yield
        return
    from quick_interpreter import quick

    with quick():
        yield


@pytest.fixture
def references(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything but the gathering by the references, which are quicker than the interpreter."""
    from hici_kernels.kv import step

    for name in ("summaries_forward", "route_forward", "attention_forward"):
        operation = getattr(step, name)

        def call(*arguments, operation=operation):
            return operation(*("reference" if x == "triton" else x for x in arguments))

        monkeypatch.setattr(step, name, call)
