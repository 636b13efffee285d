"""Our methods as a model class of lm-evaluation-harness, on a task written here: no data is fetched."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

pytest.importorskip("transformers")
from hici_kernels.cli.main import app
from hici_kernels.evaluate import harness

runner = CliRunner()
TASK = """
task: tiny_choice
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
metric_list:
  - metric: acc
"""


def test_without_the_extra_the_command_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness._optional, "missing", lambda package, extra: f"{package}: pip [{extra}]")
    result = runner.invoke(app, ["eval", "ruler", "--model", "x"])
    assert result.exit_code == 2 and "lm_eval: pip [eval]" in result.stderr


def test_a_method_runs_a_task_of_the_harness(tmp_path: Path, model_directory: Path) -> None:
    pytest.importorskip("lm_eval")
    data = tmp_path / "data.jsonl"
    rows = [{"question": "the cat sat on", "choices": ["the mat", "a moon"], "label": i % 2} for i in range(4)]
    data.write_text("\n".join(json.dumps(r) for r in rows))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "tiny_choice.yaml").write_text(TASK.format(data=data))
    out = tmp_path / "r.json"
    arguments = ["eval", "longbench", "--model", str(model_directory), "--method", "hga", "--tasks", "tiny_choice"]
    result = runner.invoke(app, [*arguments, "--include", str(tmp_path / "tasks"), "--json", str(out)])
    assert result.exit_code == 0, result.output
    row = json.loads(out.read_text())["rows"][0]
    # the choices do not depend on the label, which alternates
    assert (row["task"], row["metric"], row["value"]) == ("tiny_choice", "acc", 0.5)
    assert row["method"] == "hga" and row["leak"]["leaks"] is False and row["density"] <= 1


def test_the_class_is_registered_for_the_harness_own_command(model_directory: Path) -> None:
    pytest.importorskip("lm_eval")
    from lm_eval.api.registry import get_model

    assert harness.register() is harness.register() is get_model("hici")
    model = get_model("hici")(pretrained=str(model_directory), method="hga", topk_groups=4, max_length=64)
    assert model.evaluated.config.topk_groups == 4 and model.max_length == 64
