"""The README names tests as proof: they must exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(not (ROOT / "README.md").is_file(), reason="needs the source tree")
def test_every_named_test_exists() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    section = readme[readme.index("## Models of the transformers library") : readme.index("## Which modes see")]
    named = re.findall(r"`(test_[a-z0-9_]+\*?)`", section)
    sources = "\n".join(
        p.read_text(encoding="utf-8") for p in (ROOT / "tests" / "transformers_models").glob("test_*.py")
    )
    defined = set(re.findall(r"^def (test_\w+)\(", sources, re.MULTILINE))
    assert len(named) > 30
    for name in named:
        assert name in defined or any(name.endswith("*") and d.startswith(name[:-1]) for d in defined), name
