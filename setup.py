"""Builds the native library, if this machine can, and puts it beside the package.

What pyproject.toml cannot say: the library is no Python extension (it has no Python symbols), so one wheel serves every
Python, and a machine without a C++ compiler gets the same package without it.
"""

from __future__ import annotations

import atexit
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import ClassVar

from setuptools import Command, Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build

ROOT = Path(__file__).resolve().parent
LIBRARY = "libhici_native.so"


class Build(build):
    sub_commands: ClassVar = [*build.sub_commands, ("build_native", None)]

    def initialize_options(self) -> None:
        super().initialize_options()
        # a build directory in the source tree would hand the files of an older build to the next wheel
        self.build_base = tempfile.mkdtemp(prefix="hici-build-")
        atexit.register(shutil.rmtree, self.build_base, ignore_errors=True)


class BuildNative(Command):
    """Compile csrc/ into hici_kernels/libhici_native.so; without a compiler, say so and carry on."""

    editable_mode = False

    def initialize_options(self) -> None:
        self.build_lib: str | None = None
        self.built = False

    def finalize_options(self) -> None:
        self.set_undefined_options("build", ("build_lib", "build_lib"))

    def run(self) -> None:
        target = self.target()
        target.unlink(missing_ok=True)
        # always a fresh directory: a CMake cache remembers an interpreter that build isolation has deleted
        with tempfile.TemporaryDirectory(prefix="hici-cmake-") as scratch:
            reason = compile_library(Path(scratch), target.parent)
        self.built = reason is None
        if reason is not None:
            print(
                f"warning: hici-kernels is installed without its native library, so CPU operations use the slower "
                f"PyTorch reference: {reason}",
                file=sys.stderr,
            )

    def target(self) -> Path:
        base = ROOT / "src" if self.editable_mode else Path(str(self.build_lib))
        return base / "hici_kernels" / LIBRARY

    def get_source_files(self) -> list[str]:
        found = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cpp")]
        return [str(p.relative_to(ROOT)) for p in [ROOT / "CMakeLists.txt", *found]]

    def get_outputs(self) -> list[str]:
        return [str(self.target())] if self.built else []

    def get_output_mapping(self) -> dict[str, str]:
        return {}


def compile_library(scratch: Path, destination: Path) -> str | None:
    """None on success, else why not."""
    destination = destination.resolve()
    destination.mkdir(parents=True, exist_ok=True)
    configure = ["cmake", "-S", str(ROOT), "-B", str(scratch), f"-DHICI_OUTPUT={destination}"]
    configure += [f"-DPython_EXECUTABLE={sys.executable}", *os.environ.get("CMAKE_ARGS", "").split()]
    if shutil.which("ninja"):
        configure.append("-GNinja")
    compile_ = ["cmake", "--build", str(scratch), "--config", "Release", "--parallel", str(os.cpu_count() or 1)]
    steps = ((configure, "configuring failed"), (compile_, "compiling failed"))
    for step, what in steps:
        try:
            done = subprocess.run(step, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        except OSError:
            return "CMake was not found."
        print(done.stdout)
        if done.returncode:
            return f"{what}{_cause(done.stdout)} (its output is above)."
    if not (destination / LIBRARY).is_file():
        return "compiling left no library (its output is above)."
    return None


def _cause(output: str) -> str:
    """What CMake says is wrong, in a line: the module that its Python lacks, or the first error."""
    found = re.search(r"No module named .*|No CMAKE_CXX_COMPILER could be found|CMake Error.*\n+ *(.*)", output)
    return "" if found is None else f": {(found[1] or found[0]).strip()}"


class Wheel(bdist_wheel):
    """py3-none-<platform> with the library, py3-none-any without."""

    def run(self) -> None:
        # the tag and the place of the files follow from whether the library was built
        self.run_command("build")
        self.root_is_pure = not self.distribution.has_ext_modules()
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        if not self.distribution.has_ext_modules():
            return super().get_tag()
        self.root_is_pure = False
        return "py3", "none", super().get_tag()[2]


class Package(Distribution):
    def has_ext_modules(self) -> bool:
        command = self.get_command_obj("build_native", create=False)
        return bool(command is not None and command.built)


setup(
    distclass=Package,
    cmdclass={"build": Build, "build_native": BuildNative, "bdist_wheel": Wheel},
)
