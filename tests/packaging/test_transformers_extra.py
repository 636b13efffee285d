"""The integrations without transformers, and beside a release they are not tested with; each in its own process."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

STAND_IN = """
import sys, types
if {version!r} is None:
    sys.modules["transformers"] = sys.modules["tqdm"] = None  # which comes with it
else:
    stand_in = types.ModuleType("transformers")
    stand_in.__version__ = {version!r}
    sys.modules["transformers"] = stand_in
import hici_kernels
try:
    {what}
except ImportError as error:
    print(error)
else:
    raise SystemExit("no error")
"""


def message(version: str | None, what: str = "hici_kernels.apply_hga") -> str:
    code = STAND_IN.format(version=version, what=what)
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_without_transformers() -> None:
    for what in (
        "hici_kernels.apply_hga",
        "import hici_kernels.integrations",
        "from hici import load_hici",
        "from hici_kernels.evaluate import models, passkey, perplexity, topics; models.open_model('demo')",
    ):
        found = message(None, what)
        assert "needs transformers >=5.14,<5.24" in found and "pip install 'hici-kernels[transformers]'" in found


def test_outside_the_tested_range() -> None:
    for version in ("5.13.2", "4.57.1", "5.24.0", "6.0.0.dev0"):
        found = message(version)
        assert f"found transformers {version}" in found and ">=5.14,<5.24" in found


def test_the_range_is_stated_once() -> None:
    """pyproject.toml and the check say the same; the Makefile's matrix holds both ends."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    stated = set(re.findall(r'"transformers(>=[\d.,<]+)"', project))
    assert stated == {">=5.14,<5.24"}
    tested = re.search(r"^TRANSFORMERS \?= (.+)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert tested is not None
    assert [v.rsplit(".", 1)[0] for v in tested[1].split()] == ["5.14", "5.23"]
