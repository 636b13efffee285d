"""Every command of docs/handbook.md, at sizes that take seconds."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
from typer.testing import CliRunner

from hici_kernels import HiCIConfig
from hici_kernels.cli.main import app
from hici_kernels.evaluate.models import open_model

ROOT = Path(__file__).parents[2]
BLOCKS = re.findall(r"```sh\n(.*?)```", (ROOT / "docs" / "handbook.md").read_text(encoding="utf-8"), re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.splitlines() if line.strip()]
#: options whose value is replaced, by the first two words of the command
SMALL = {
    "--lengths": "64,128",
    "--windows": "2",
    "--trials": "1",
    "--topics": "1,2",
    "--cases": "1",
    "--limit": "1",
    "--length": "512",
    "--hidden": "64",
    "--depths": "0,1",
}
SLOTS = {"num_heads": 2, "bottleneck_dim": 8, "shared_compress_dim": 4, "num_local_slots": 3}
RECIPE = ["--set", "context=64", "--set", "max_steps=1", "--set", "accumulation=1"]
#: options that are added
MORE = {
    "hici train": [*RECIPE, "--set", f"hici={json.dumps(SLOTS)}"],
    "hici sft": RECIPE,
    "eval passkey": ["--lengths", "256,512"],
    "eval topics": ["--max-new-tokens", "2"],
    "bench --suite": ["--op", "merge_attention", "--dtype", "float32"],
    "benchmarks/quality/hici_extension.py": ["--tiny", "--threads", "1"],
    "benchmarks/quality/hici_step.py": ["--tiny", "--threads", "1", "--rounds", "1"],
    "benchmarks/distributed/context_parallel.py": ["--segment-len", "64", "--rounds", "1"],
}


def smaller(words: list[str]) -> list[str]:
    found = list(words)
    for i, word in enumerate(found[:-1]):
        if word in SMALL:
            found[i + 1] = SMALL[word]
    for key, options in MORE.items():
        if key in " ".join(words):
            for name in options[::2]:
                while name in found:
                    at = found.index(name)
                    del found[at : at + 2]
            found += options
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, model_directory: Path) -> Path:
    """Where the commands run: a text, its tokens under both tokenizers, a model and a HiCI checkpoint for it."""
    from transformers import AutoModelForCausalLM

    from hici_kernels.integrations import apply_hici, save_hici

    where = tmp_path_factory.mktemp("handbook")
    (where / "book.txt").write_text("The pass key is hidden in the first topic we discussed.\n" * 80)
    (where / "text.jsonl").write_text("".join(json.dumps({"text": f"w{i} the pass key " * 9}) + "\n" for i in range(9)))
    answers = [{"instruction": f"key {i}", "output": f"the key is {i}"} for i in range(9)]
    (where / "answers.json").write_text(json.dumps(answers))
    (where / "MODEL").symlink_to(model_directory)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(model_directory)
    apply_hici(model, HiCIConfig(segment_len=32, **SLOTS))
    save_hici(model, where / "CHECKPOINT")
    return where


def test_a_result_names_its_adapter(folder: Path) -> None:
    opened = open_model(folder / "MODEL", "hici", adapter=folder / "CHECKPOINT")
    head = opened.describe(64, 0)
    assert head["adapter"] == str(folder / "CHECKPOINT") and head["method"] == "hici"
    assert "adapter" not in open_model(folder / "MODEL").describe(64, 0)


@pytest.mark.parametrize("command", COMMANDS)
def test_command(command: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    words = smaller(shlex.split(command))
    if "ruler" in words or "longbench" in words:
        # the harness's own data: see test_harness.py for a task that needs none
        result = CliRunner().invoke(app, [*words[1:], "--help"])
        assert result.exit_code == 0
        options = {w for w in words if w.startswith("--")}
        assert all(option in result.output for option in options), result.output
        return
    if words[1] in ("train", "sft"):
        pytest.importorskip("accelerate")
        pytest.importorskip("peft")
        if words[1] == "sft" and not (folder / "RUN").is_dir():
            before = next(c for c in COMMANDS if c.startswith("hici train"))
            assert CliRunner().invoke(app, smaller(shlex.split(before))[1:]).exit_code == 0
    if "eval" in words and "--data" in words and not (folder / "book.bin").is_file():
        prepare = next(c for c in COMMANDS if c.startswith("hici eval prepare"))
        assert CliRunner().invoke(app, shlex.split(prepare)[1:]).exit_code == 0
    if "eval" in words and "--data" in words and "--model" not in words:
        done = CliRunner().invoke(app, ["eval", "prepare", "book.txt", "--out", "bytes.bin"])
        assert done.exit_code == 0
        words[words.index("--data") + 1] = "bytes.bin"
    if words[0] == "hici":
        result = CliRunner().invoke(app, words[1:])
        assert result.exit_code == 0, result.output
    else:
        run_program(words, folder)
    for option in ("--json", "--chart", "--out"):
        if option in words:
            assert (folder / words[words.index(option) + 1]).exists()


def run_program(words: list[str], folder: Path) -> None:
    if "benchmarks/quality" in words[1] and importlib.util.find_spec("peft") is None:
        pytest.skip("peft is not installed")
    start = {
        "python": [sys.executable],
        "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone"],
    }[words[0]]
    words = [str(ROOT / w) if w.startswith("benchmarks/") else w for w in words[1:]]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*start, *words], cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip()


def test_the_handbook_has_commands_for_everything_it_promises() -> None:
    text = " ".join(COMMANDS)
    for part in (
        "train",
        "sft",
        "prepare",
        "ppl",
        "passkey",
        "topics",
        "ruler",
        "longbench",
        "hici_extension",
        "context_parallel",
    ):
        assert part in text
