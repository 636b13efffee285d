"""The command line as a user meets it: exit codes, one-line errors, quick help."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from hici_kernels._dispatch import OPS, ORDER
from hici_kernels.cli import info
from hici_kernels.cli.main import app, user_errors
from hici_kernels.errors import KVStoreError

runner = CliRunner()


def test_help_lists_the_commands() -> None:
    done = subprocess.run([sys.executable, "-m", "hici_kernels", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    for command in ("demo", "info", "bench"):
        assert command in done.stdout


def test_info_tells_what_serves_what() -> None:
    result = runner.invoke(app, ["info", "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert set(report["operations"]) == set(OPS)
    for row in report["operations"].values():
        assert set(row) == set(ORDER) and row["reference"] is None
        assert all(reason is None or len(reason) > 10 for reason in row.values())
    assert report["cpu"]["cores"] >= 1


def test_info_prints_every_operation_and_reason() -> None:
    result = runner.invoke(app, ["info"])
    assert result.exit_code == 0
    assert all(op in result.stdout for op in OPS) and "[1]" in result.stdout


def test_import_times() -> None:
    times = info.import_times()
    assert times["torch_s"] > 0 and times["hici_kernels_s"] > 0


def test_install_time_says_why_it_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(info, "source_tree", lambda: None)
    found = info.install_time(None)
    assert found["seconds"] is None and "--source" in found["why"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["bench", "--op", "attentoin"],
        ["bench", "--impl", "fast"],
        ["bench", "--suite", "gpu"],
        ["bench", "--op", "merge_attention", "--json", "."],
        ["bench", "--op", "merge_attention", "--json", "/dev/null/x.json"],
        ["bench", "--op", "merge_attention", "--chart", "chart.xyz"],
        ["info", "--timing", "--source", "/nonexistent-tree"],
        ["demo", "--text", "/nonexistent-file", "--quick"],
    ],
)
def test_user_errors_are_one_line_and_code_2(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(info, "import_times", lambda: {"torch_s": 1.0, "hici_kernels_s": 0.1, "runs": 1})
    result = runner.invoke(app, arguments)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("hici: ") and len(result.stderr.strip().splitlines()) == 1


def test_a_failing_disk_is_one_line_too(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as ended, user_errors():
        raise KVStoreError("no room for page 3", layer=0, row=0, chunk=3, file="f")
    assert ended.value.exit_code == 2
    assert capsys.readouterr().err.splitlines()[0].startswith("hici: no room for page 3")


def test_bench_from_the_command_line(tmp_path: Path) -> None:
    out = tmp_path / "x.json"
    result = runner.invoke(
        app, ["bench", "--op", "merge_attention", "--impl", "reference", "--dtype", "float32", "--json", str(out)]
    )
    assert result.exit_code == 0, result.output
    assert "GFLOP/s" in result.stdout and json.loads(out.read_text())["cases"]
