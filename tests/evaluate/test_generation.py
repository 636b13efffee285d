"""What retrieval tasks ask and count as an answer; files that a command keeps; lengths that are looked at first."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "transformers_models"))

from test_chat_and_cli import save_tokenizer
from tiny_models import tiny
from tokenizers import processors

from hici_kernels.cli.main import app
from hici_kernels.evaluate import passkey, perplexity, tokens, topics
from hici_kernels.evaluate.generation import continue_greedily
from hici_kernels.evaluate.leak import leak_test
from hici_kernels.evaluate.models import open_model

IDS = list(range(10, 40))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    tiny().save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize(
    "setting",
    [
        {"repetition_penalty": 5.0},
        {"num_beams": 3},
        {"no_repeat_ngram_size": 1},
        {"suppress_tokens": [*range(50)]},
        {"do_sample": True, "temperature": 9.0},
        {"min_new_tokens": 5},
    ],
    ids=str,
)
def test_greedy_is_greedy(setting: dict[str, Any], directory: Path) -> None:
    """Whatever a model card ships as its generation settings, which stay as they were."""
    opened = open_model(directory)
    model: Any = opened.model
    ids = torch.tensor([IDS])
    for _ in range(8):
        ids = torch.cat((ids, opened.logits(ids, keep=1)[:, -1:].argmax(-1)), 1)
    expected = ids[0, len(IDS) :].tolist()
    for name, value in setting.items():
        setattr(model.generation_config, name, value)
    before = model.generation_config
    if "min_new_tokens" not in setting:
        assert continue_greedily(opened, IDS, 8) == expected
    assert continue_greedily(opened, IDS, 8, stop=(expected[2],)) == expected[: expected.index(expected[2])]
    model.generation_config.eos_token_id = expected[1]
    assert continue_greedily(opened, IDS, 8) == expected[: expected.index(expected[1])]
    assert model.generation_config is before


def test_prompts_begin_as_texts_do(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the tokenizer's first token and without its last; answers have neither."""
    opened = open_model(directory)
    rules = processors.TemplateProcessing(single="<s> $A e", special_tokens=[("<s>", 1), ("e", 5)])
    opened.tokenizer.backend_tokenizer.post_processor = rules
    opened.tokenizer.eos_token = "e"
    asked: list[tuple[list[int], int]] = []
    for module in (passkey, topics):
        monkeypatch.setattr(module, "continue_greedily", lambda e, ids, count: asked.append((ids, count)) or [])
    passkey.run(opened, [200], [0.5], trials=1)
    topics.run(opened, [2], cases=1, new_tokens=3)
    assert [ids[0] for ids, _ in asked] == [1, 1] and not any(5 in ids for ids, _ in asked)
    assert asked[0][1] == 1 and len(asked[0][0]) <= 200


def test_lengths_are_looked_at_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = open_model("demo")
    monkeypatch.setattr(type(opened), "describe", lambda *a: pytest.fail("work was done"))
    with pytest.raises(ValueError, match="data must hold more than 400 tokens, got 300"):
        perplexity.run(opened, np.zeros(300, np.uint8), [100, 400])
    with pytest.raises(ValueError, match="length must be at least"):
        passkey.run(opened, [900, 100], [0.5])


def test_a_loss_beyond_floats_is_an_infinite_perplexity(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = open_model("demo")

    def logits(self: Any, ids: torch.Tensor, keep: int = 0) -> torch.Tensor:
        out = torch.zeros(*ids.shape, 256)
        out[..., 7] = 5000.0
        return out[:, -keep:] if keep else out

    monkeypatch.setattr(type(opened), "logits", logits)
    assert perplexity.sliding(opened, np.zeros(300, np.uint8), 64)["perplexity"] == float("inf")


@pytest.mark.parametrize("length", [3, 17, 41, 64, 101])
def test_leaks_of_short_texts_are_found(length: int) -> None:
    """A token that sees the other one of its pair: in every length some cut is between the two."""
    table = torch.randn(11, 11, generator=torch.Generator().manual_seed(0))

    def peeks(ids: torch.Tensor) -> torch.Tensor:
        other = torch.arange(ids.shape[1]) ^ 1
        return table[ids[:, other.clamp(max=ids.shape[1] - 1)]]

    assert leak_test(peeks, 11, length).leaks
    assert min(leak_test(lambda ids: table[ids], 11, length).at) <= max(2, length // 4)


def test_cases_may_hold_any_character(tmp_path: Path) -> None:
    case = {"prompt": "a\u2028b\u0085c", "topics": ["tea"]}
    (tmp_path / "cases.jsonl").write_text(json.dumps(case, ensure_ascii=False) + "\n", encoding="utf-8")
    assert topics.read_cases(tmp_path / "cases.jsonl") == [case]


def test_no_command_replaces_what_it_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("w1 " * 400, encoding="utf-8")
    tokens.prepare([Path("a.txt")], tokens.ByteTokenizer(), Path("a.bin"))
    held = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    measure = ["eval", "ppl", "--data", "a.bin", "--lengths", "64", "--windows", "1"]
    for arguments, says in (
        (["eval", "prepare", "a.txt", "--out", "./a.txt"], "out must be another file"),
        (["eval", "prepare", "a.txt", "--out", "b.bin", "--json", "b.bin"], "--json must be a file of its own"),
        (["eval", "prepare", "a.txt", "--out", "b.bin", "--json", "a.txt"], "--json must be a file of its own"),
        (["eval", "prepare", "a.txt", "--out", "b.bin", "--whole", "--piece", "3"], "--piece has no meaning"),
        ([*measure, "--json", "../" + tmp_path.name + "/a.bin"], "--json must be a file of its own"),
        ([*measure, "--json", "a.bin.json"], "--json must be a file of its own"),
        ([*measure, "--json", "x.png", "--chart", "x.png"], "--chart must be a file of its own"),
        (["eval", "topics", "--file", "a.txt", "--json", "a.txt"], "--json must be a file of its own"),
        (["merge", ".", "slots", "."], "not a model directory"),
    ):
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 2 and says in done.stderr, done.output
        assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == held
    Path("config.json").write_text("{}", encoding="utf-8")
    for out, says in (
        (".", "another directory than the base"),
        ("slots", "than the checkpoint"),
        ("a.txt", "the file"),
    ):
        done = CliRunner().invoke(app, ["merge", ".", "slots", out])
        assert done.exit_code == 2 and says in done.stderr, done.output
    Path("a.bin.json").write_text("[]", encoding="utf-8")
    done = CliRunner().invoke(app, measure)
    assert done.exit_code == 2 and "must be the record of a token file" in done.stderr
