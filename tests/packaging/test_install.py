"""The wheel: how it is tagged, what it holds, what it is tied to."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from filelock import FileLock

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "hici_kernels"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),  # a whole build, beside other tests
    pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="needs the source tree"),
]


def build(folder: Path, **environment: str) -> tuple[Path, str]:
    """The wheel that pip makes of this tree under build isolation, and what pip printed."""
    command = [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "--no-cache-dir", "--wheel-dir", str(folder)]
    done = subprocess.run(
        [*command, str(ROOT)], text=True, capture_output=True, timeout=1500, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    (wheel,) = folder.glob("hici_kernels-*.whl")
    return wheel, done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that --wheel names, else one built here, once for all test processes."""
    given: Path | None = request.config.getoption("--wheel")
    if given is not None:
        return given
    if not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        pytest.skip("no C++ compiler")
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if hasattr(request.config, "workerinput") else base) / "wheel"
    with FileLock(f"{folder}.lock"):
        return next(folder.glob("hici_kernels-*.whl"), None) or build(folder)[0]


def names(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def test_one_wheel_for_every_python(wheel: Path) -> None:
    assert re.search(r"-py3-none-(linux|manylinux|macosx)[a-z0-9_]*\.whl$", wheel.name), wheel.name


def test_holds_the_package_and_nothing_else(wheel: Path) -> None:
    found = set(names(wheel))
    wanted = {"hici/py.typed", "hici/__init__.pyi", "hici_kernels/py.typed", "hici_kernels/libhici_native.so"}
    sources = {str(p.relative_to(ROOT / "src")) for p in (ROOT / "src").rglob("*.py")}
    data = {str(p.relative_to(ROOT / "src")) for p in (PACKAGE / "demo" / "data").glob("*") if p.is_file()}
    assert (wanted | sources | data) - found == set()
    assert {name.split("/")[0].split("-")[0] for name in found} == {"hici", "hici_kernels"}
    assert [n for n in found if n.endswith(".so")] == ["hici_kernels/libhici_native.so"]
    assert any(n.endswith("licenses/LICENSE") for n in found)


def test_native_library_is_tied_to_no_torch_and_no_python(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        library = archive.extract("hici_kernels/libhici_native.so", tmp_path)
    content = Path(library).read_bytes()
    assert not re.search(rb"libtorch|libc10|libpython|libgomp|_ZN3c10|_ZN2at|_Py_", content)
    if shutil.which("readelf") is None:
        pytest.skip("no readelf")
    dynamic = subprocess.run(["readelf", "-d", library], text=True, capture_output=True, check=True).stdout
    assert "RUNPATH" not in dynamic and "RPATH" not in dynamic, dynamic
    symbols = subprocess.run(
        ["readelf", "-W", "--dyn-syms", library], text=True, capture_output=True, check=True
    ).stdout
    undefined = {line.split()[-1].split("@")[0] for line in symbols.splitlines() if " UND " in line and "@" not in line}
    foreign = {name for name in undefined if name.startswith(("TVM", "_ZN3tvm"))}
    # all of them are in the oldest apache-tvm-ffi that pyproject.toml allows
    assert foreign == {
        "TVMFFIBacktrace",
        "TVMFFIErrorMoveFromRaised",
        "TVMFFIErrorSetRaised",
        "TVMFFIGetTypeAttrColumn",
        "TVMFFIGetTypeInfo",
    }


def test_without_a_compiler_the_same_package_is_pure(tmp_path: Path) -> None:
    pure, output = build(tmp_path, CXX="/nonexistent/c++")
    assert pure.name.endswith("-py3-none-any.whl")
    assert not [n for n in names(pure) if n.endswith(".so")]
    assert output.count("warning: hici-kernels is installed without its native library") == 1
    site = tmp_path / "site"
    with zipfile.ZipFile(pure) as archive:
        archive.extractall(site)
    code = """
import torch, hici_kernels as hk
from hici_kernels import _native
from hici_kernels.ops.global_stats import global_stats
assert _native.__file__.startswith(SITE), _native.__file__
assert global_stats(torch.ones(1, 2, 3, 4)).shape == (1, 5, 4)
reason = _native.status()
assert "was not built" in reason and reason.count(". ") == 0, reason
try:
    global_stats(torch.ones(1, 2, 3, 4), impl="cpu")
except hk.ImplError as error:
    assert reason in str(error)
else:
    raise SystemExit("a library that is not there was used")
""".replace("SITE", repr(str(site)))
    environment = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(
    not (SPEC := importlib.util.find_spec("build")) or not SPEC.origin, reason="needs the package build"
)
def test_source_archive_is_complete(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "build", "--sdist", "--outdir", str(tmp_path), str(ROOT)]
    done = subprocess.run(command, text=True, capture_output=True, timeout=600)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        held = {name.split("/", 1)[1] for name in tar.getnames() if "/" in name}
    wanted = ["CMakeLists.txt", "LICENSE", "Makefile", "constraints.txt", "setup.py", "build_backend/hici_build.py"]
    for folder, kinds in (("csrc", (".cpp", ".h")), ("tests", (".py",)), ("benchmarks", (".py",)), ("docs", (".md",))):
        wanted += [str(p.relative_to(ROOT)) for p in (ROOT / folder).rglob("*") if p.suffix in kinds]
    assert not set(wanted) - held
    assert not [name for name in held if name.endswith((".so", ".pyc"))]
