"""The evidence script at a size that means nothing: every row, leak verdicts, resuming after an interruption."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "quality"))

import hici_extension as evidence

from hici_kernels.config import LEAK_FREE_MODES


def test_one_command_gives_one_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert evidence.main(["--out", str(out), "--tiny", "--threads", "1", "--chart", str(tmp_path / "c.png")]) == 0
    text = capsys.readouterr().out
    result = json.loads((out / "result.json").read_text())
    assert [r["row"] for r in result["rows"]] == [r.name for r in evidence.ROWS]
    for row in result["rows"]:
        mode = row["weights"].removeprefix("hici-") if row["reading"] == "trained" else None
        assert row["leak"]["leaks"] == (mode is not None and mode not in LEAK_FREE_MODES), row
        assert set(row["loss"]) == {"64", "128", "256"} and 0 < row["density"] <= 1
        line = next(x for x in text.splitlines() if x.startswith(f"| {row['row']} |"))
        assert ("LEAKS" in line) == row["leak"]["leaks"] == ("| [" in line)
    added = {t["training"]: t["parameters_added"] for t in result["trainings"]}
    # r (in + out) of q, k, v, o of one layer
    assert added["base"] == 0 and added["lora"] == added["s2"] == 8 * (64 + 48 + 48 + 64)
    assert added["hici-none"] == added["hici-causal_shift"] > added["lora"]
    assert (tmp_path / "c.png").read_bytes()[:4] == b"\x89PNG"
    # a second call computes nothing
    before = {p: p.stat().st_mtime_ns for p in out.rglob("state.pt")}
    assert evidence.main(["--out", str(out), "--tiny", "--threads", "1"]) == 0
    assert before == {p: p.stat().st_mtime_ns for p in out.rglob("state.pt")}
    assert evidence.main(["--out", str(out), "--steps", "7"]) == 2


@pytest.mark.parametrize("training", ["base", "hici-causal_shift"])
def test_an_interrupted_training_resumes_to_the_same_losses(
    training: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = evidence.load_corpus()[0][:20000]
    sizes = evidence.TINY
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for folder in (whole, cut):
        if training != "base":
            evidence.train(folder, sizes, "base", 0, stream)
    expected = evidence.train(whole, sizes, training, 0, stream)
    save, calls = evidence.save, []

    def dies(path: Path, state: dict[str, Any]) -> None:
        calls.append(path)
        if len(calls) == 2:
            path.with_suffix(".part").write_bytes(b"half a file")
            raise KeyboardInterrupt
        save(path, state)

    monkeypatch.setattr(evidence, "save", dies)
    with pytest.raises(KeyboardInterrupt):
        evidence.train(cut, sizes, training, 0, stream)
    monkeypatch.setattr(evidence, "save", save)
    assert torch.load(cut / training / "state.pt", weights_only=True)["record"]["step"] == 1
    found = evidence.train(cut, sizes, training, 0, stream)
    assert found["losses"] == expected["losses"]


def test_training_attends_as_its_name_says() -> None:
    sizes = evidence.TINY
    ids = torch.arange(256)[None]
    outs = {}
    for training in evidence.TRAININGS:
        model = evidence.prepare(evidence.build(sizes, 0), sizes, training, 0).train()
        outs[training] = model(input_ids=ids, use_cache=False).logits.detach()
    # the first segment of a leak-free mode is plain causal attention; the others differ from it everywhere else
    quarter = sizes.segment_len
    assert torch.allclose(outs["hici-causal_shift"][:, :quarter], outs["lora"][:, :quarter], atol=1e-5)
    for training in evidence.TRAININGS[1:]:
        assert not torch.allclose(outs[training][:, quarter:], outs["lora"][:, quarter:], atol=1e-5), training
