"""docs/models.md says what the tests show: it is up to date, and every test it names is there."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("transformers")

import feature_table


def test_the_page_is_up_to_date():
    assert feature_table.PAGE.read_text(encoding="utf-8") == feature_table.page()


def test_every_test_named_exists():
    root = feature_table.PAGE.parents[1]
    named = [*feature_table.test_ids(feature_table.HGA_ROWS), *feature_table.test_ids(feature_table.HICI_ROWS)]
    files = sorted({name.split("::")[0] for name in named})
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *files],
        cwd=root, text=True, capture_output=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    missing = sorted(set(named) - set(done.stdout.splitlines()))
    assert not missing
