"""Protocols against loops written out, leak verdicts of every mode, retrieval scored by hand, commands end to end."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("transformers")

from hici_kernels.cli.main import app
from hici_kernels.config import CONTEXT_MODES, LEAK_FREE_MODES, HGAConfig, HiCIConfig
from hici_kernels.demo.lm import ByteLM
from hici_kernels.evaluate import passkey, perplexity, tokens, topics
from hici_kernels.evaluate.density import density_of
from hici_kernels.evaluate.generation import continue_greedily
from hici_kernels.evaluate.leak import leak_test
from hici_kernels.evaluate.models import Evaluated, leak_free, open_model

runner = CliRunner()
SLOTS: dict[str, Any] = {"num_local_slots": 3, "num_heads": 2, "bottleneck_dim": 16, "shared_compress_dim": 8}
FEW = {"chunk_size": 16, "group_size": 8, "keep_first": 1, "keep_last": 1, "topk_chunks": 2, "topk_groups": 2}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(Path(json.__file__).read_text(encoding="utf-8") * 2 + "éü∂\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def data(text: Path) -> Path:
    out = text.with_name("tokens.bin")
    tokens.prepare([text], tokens.ByteTokenizer(), out)
    return out


class Words:
    """A tokenizer whose result shows where pieces end."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [1] * add_special_tokens + [len(w) + 2 for w in text.split()]


def test_token_files_have_the_published_layout(tmp_path: Path) -> None:
    a, b = tmp_path / "a.txt", tmp_path / "b.txt"
    a.write_text("one three")
    b.write_text("seven eleven")
    record = tokens.prepare([a, b], Words(65535), tmp_path / "x.bin", piece=None)
    assert np.fromfile(tmp_path / "x.bin", np.uint16).tolist() == [1, 5, 7, 7, 8] and record["tokens"] == 5
    assert tokens.prepare([a], Words(65536), tmp_path / "y.bin")["dtype"] == "uint32"
    assert np.fromfile(tmp_path / "y.bin", np.uint32).tolist() == [5, 7]
    # pieces of 6 characters: a boundary inside "three"
    tokens.prepare([a, b], Words(100), tmp_path / "z.bin", piece=6)
    assert tokens.read(tmp_path / "z.bin").tolist() == [5, 4, 5, 4, 5, 4, 6]
    (tmp_path / "z.bin.json").unlink()
    assert tokens.read(tmp_path / "z.bin", 100).dtype == np.uint16
    with pytest.raises(ValueError, match="vocab_size must be given"):
        tokens.read(tmp_path / "z.bin")
    with pytest.raises(ValueError, match="another tokenizer"):
        tokens.read(tmp_path / "z.bin", 5)


def test_a_failed_prepare_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"fine " * 100)
    tokens.prepare([path], tokens.ByteTokenizer(), tmp_path / "x.bin", piece=10)
    path.write_bytes(b"fine " * 100 + b"\xff")
    with pytest.raises(ValueError):
        tokens.prepare([path], tokens.ByteTokenizer(), tmp_path / "x.bin", piece=10)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="give no token"):
        tokens.prepare([path], tokens.ByteTokenizer(), tmp_path / "x.bin")
    assert len(tokens.read(tmp_path / "x.bin")) == 500


def test_the_demo_model_is_the_demo_model(data: Path) -> None:
    ids = torch.from_numpy(tokens.read(data)[:300].astype(np.int64))[None]
    opened = open_model("demo")
    with torch.no_grad():
        expected = ByteLM.load()(ids)
    assert torch.allclose(opened.logits(ids), expected, atol=1e-4)


def test_sliding_is_the_published_loop(data: Path) -> None:
    opened, ids = open_model("demo"), tokens.read(data)[:700]
    found = perplexity.sliding(opened, ids, 128, stride=100)
    losses = []
    for start in range(0, len(ids) - 128, 100):
        window = torch.from_numpy(ids[start : start + 128].astype(np.int64))[None]
        p = torch.softmax(opened.logits(window)[0, :-1].double(), -1)
        losses += [-math.log(float(p[t, window[0, t + 1]])) for t in range(127)]
    assert found["scored_tokens"] == len(losses) == found["windows"] * 127
    assert found["loss"] == pytest.approx(np.mean(losses), abs=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))


def test_last_token_scores_what_the_model_has_not_seen(data: Path) -> None:
    opened, ids = open_model("demo"), tokens.read(data)[:400]
    found = perplexity.last_token(opened, ids, 100, windows=7, seed=3)
    starts = np.random.default_rng(3).permutation(300)[:7]
    losses = []
    for start in starts:
        window = torch.from_numpy(ids[start : start + 100].astype(np.int64))[None]
        losses.append(-float(opened.logits(window)[0, -1].log_softmax(-1)[int(ids[start + 100])]))
    assert found["loss"] == pytest.approx(np.mean(losses), abs=1e-5) and found["windows"] == 7


@pytest.mark.parametrize("mode", CONTEXT_MODES)
def test_leak_verdict_of_every_mode(mode: str) -> None:
    torch.manual_seed(0)
    opened = open_model("demo", "hici", config={"segment_len": 64, "context_mode": mode, **SLOTS})
    with torch.no_grad():
        for name, p in opened.model.named_parameters():
            if "local_constructor" in name or "global_integrator" in name:
                p.copy_(torch.randn(p.shape) * 0.3)
    verdict = opened.leak(256)
    assert verdict.leaks == (mode not in LEAK_FREE_MODES) == (not leak_free(opened)), verdict
    if mode == "none":
        assert verdict.furthest > 64
    full = open_model("demo", "hici", config={"segment_len": 64, "context_mode": mode, **SLOTS}, attention="full")
    assert not full.leak(256).leaks


@pytest.mark.parametrize("method, config", [("none", {}), ("hga", FEW), ("dca", {"chunk_len": 96, "local_len": 32})])
def test_training_free_methods_do_not_leak(method: str, config: dict[str, Any]) -> None:
    opened = open_model("demo", method, config=config)
    assert not opened.leak(200).leaks and leak_free(opened)


def test_a_leak_of_one_position_is_found() -> None:
    table = torch.randn(11, 11, generator=torch.Generator().manual_seed(0))

    def peeks(ids: torch.Tensor) -> torch.Tensor:
        return table[ids] + 0.01 * table[ids].roll(-1, 1)

    assert leak_test(peeks, 11, 64).furthest == 1
    assert not leak_test(lambda ids: table[ids], 11, 64).leaks


@pytest.mark.parametrize("other", [-1e4, -3e38, -math.inf])
def test_a_leak_shows_beside_a_logit_of_any_size(other: float) -> None:
    table = torch.randn(11, 11, generator=torch.Generator().manual_seed(0))

    def logits(ids: torch.Tensor) -> torch.Tensor:
        found = table[ids] + 0.01 * table[ids].sum(1, keepdim=True)
        found[..., 3] = other
        return found

    assert leak_test(logits, 11, 64).leaks


def test_logits_that_are_no_numbers_get_no_verdict() -> None:
    with pytest.raises(ValueError, match="NaN"):
        leak_test(lambda ids: torch.full((*ids.shape, 11), math.nan), 11, 64)


def test_a_leak_at_the_end_of_the_text_is_found() -> None:
    opened = open_model("demo", "hga", config={"routing": "block"})
    assert opened.leak(1280).leaks


def test_an_adapter_is_for_hici(tmp_path: Path) -> None:
    for method in ("none", "hga", "dca"):
        with pytest.raises(ValueError, match="adapter is for method 'hici'"):
            open_model(tmp_path, method, adapter=tmp_path)


def test_density_counts_pairs_one_by_one() -> None:
    for recurrence, mode in ((0, "causal_gi"), (3, "causal_shift")):
        config = HiCIConfig(segment_len=8, recurrence_len=recurrence, context_mode=mode, **SLOTS)
        pairs = 0
        for t in range(21):
            slots = 3 + 4 if mode == "causal_gi" or t >= 8 else 0
            pairs += t % 8 + 1 + slots + (recurrence if t >= 8 else 0)
        assert density_of("hici", config, 21) == pytest.approx(pairs / (21 * 22 / 2))
    hga = HGAConfig.from_dict({**FEW})
    from hici_kernels import Rope, hga_attention
    from hici_kernels.demo.counting import count_pairs

    q = torch.randn(1, 200, 1, 16, generator=torch.Generator().manual_seed(0))
    found: Any = hga_attention(q, q, q, hga, rope=Rope.from_theta(100.0, 16), return_routes=True)
    assert density_of("hga", hga, 200) == pytest.approx(count_pairs(found.routes, hga).density)
    assert density_of("none", None, 200) == 1.0


@pytest.mark.parametrize("length", [600, 900])
@pytest.mark.parametrize("depth", [0.0, 0.4, 1.0])
def test_passkey_prompts_have_the_length_and_the_depth(length: int, depth: float) -> None:
    tokenizer = tokens.ByteTokenizer()
    text = tokenizer.decode(passkey.prompt_of(tokenizer, length, depth, 4711))
    assert length - len(passkey.FILLER) < len(text) <= length
    before, after = text.split("The pass key is 4711. Remember it. 4711 is the pass key.")
    share = before.count("The grass") / max(1, text.count("The grass"))
    assert abs(share - depth) <= 0.5 / max(1, text.count("The grass"))
    assert after.endswith("The pass key is")
    with pytest.raises(ValueError, match="length must be at least"):
        passkey.prompt_of(tokenizer, 100, depth, 1)


def test_passkey_is_scored_by_the_exact_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = open_model("demo")

    def answers(evaluated: Any, ids: list[int], count: int, stop: tuple[int, ...] = ()) -> list[int]:
        text = evaluated.tokenizer.decode(ids)
        key = text.split("The pass key is ")[1].split(".")[0]
        right = evaluated.tokenizer.encode(f" {key}")
        assert len(right) == count
        return right if text.count("The grass") < 6 else [*right[:-1], right[-1] ^ 1]

    monkeypatch.setattr(passkey, "continue_greedily", answers)
    result = passkey.run(opened, [520, 1200], [0.0, 1.0], trials=2)
    assert [c["accuracy"] for c in result["cells"]] == [1.0, 1.0, 0.0, 0.0]


def test_topics_are_scored_by_the_published_rules() -> None:
    assert topics.is_right("The History of Tea", "['the history of tea'].")
    assert not topics.is_right("the history of tea", "tea")
    lines = [
        "Label: The Role of Art, Predict: ['the role of art'], prompt length: 100",
        "Label: a, b, Predict: I think A, B it was",
        "Label: x, Predict: y, Predict: x",
        "unreadable",
    ]
    assert topics.score_lines(lines) == 0.5
    a, b = topics.make_case(4, 0, 0), topics.make_case(4, 0, 0)
    assert a == b != topics.make_case(4, 1, 0) and len(set(a["topics"])) == 4
    assert a["prompt"].index(a["topics"][0]) < a["prompt"].index(a["topics"][1])


def test_topics_cases_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "cases.jsonl"
    cases = [{"prompt": "USER: about tea", "topics": ["tea"]}, {"prompt": "USER: bees", "topics": ["bees", "tea"]}]
    file.write_text("\n".join(json.dumps(c) for c in cases))
    opened = open_model("demo")
    said = tokens.ByteTokenizer().encode(" tea.\n USER: and bees")
    monkeypatch.setattr(topics, "continue_greedily", lambda *a: said)
    result = topics.run(opened, file=file)
    with pytest.raises(ValueError, match="topics must be left out with a file"):
        topics.run(opened, [3], file=file)
    assert [(r["topics"], r["accuracy"]) for r in result["rows"]] == [(1, 1.0), (2, 0.0)]
    for wrong in ({}, [], {"prompt": "a", "topics": "tea"}, {"prompt": "a", "topics": [3]}, {"topics": ["tea"]}):
        file.write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match="line 1"):
            topics.read_cases(file)


def test_commands_write_json_table_and_chart(tmp_path: Path, text: Path) -> None:
    data = tmp_path / "t.bin"
    summary = tmp_path / "new" / "prepared.json"
    done = runner.invoke(app, ["eval", "prepare", str(text), "--out", str(data), "--json", str(summary)])
    assert done.exit_code == 0 and "tokens (uint16)" in done.stdout
    record = json.loads(summary.read_text())
    assert record["file"] == str(data) and record["tokens"] == len(tokens.read(data))
    options = ["--json", str(tmp_path / "r.json"), "--chart", str(tmp_path / "r.png")]
    hga = [x for name, value in FEW.items() for x in ("--set", f"{name}={value}")]
    arguments = ["eval", "ppl", "--data", str(data), "--lengths", "64,128", "--windows", "2", "--method", "hga", *hga]
    done = runner.invoke(app, [*arguments, *options])
    assert done.exit_code == 0, done.output
    assert "demo: hga, method attention; no leak; density" in done.stdout and "seed 0" in done.stdout
    rows = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert [(r["length"], r["protocol"], r["valid"]) for r in rows] == [
        (n, p, True) for n in (64, 128) for p in ("sliding", "last")
    ]
    assert (tmp_path / "r.png").read_bytes()[:4] == b"\x89PNG"
    (tmp_path / "r.png").unlink()
    arguments = ["eval", "passkey", "--lengths", "420", "--depths", "0,1", "--trials", "1"]
    done = runner.invoke(app, [*arguments, *options])
    assert done.exit_code == 0 and "passkey, accuracy by depth" in done.stdout, done.output
    assert (tmp_path / "r.png").is_file()
    done = runner.invoke(app, ["eval", "topics", "--topics", "1", "--cases", "1", "--max-new-tokens", "3", *options])
    assert done.exit_code == 0 and json.loads((tmp_path / "r.json").read_text())["rows"][0]["cases"] == 1, done.output


def test_a_leaking_mode_has_no_valid_sliding_perplexity(data: Path) -> None:
    opened = open_model("demo", "hici", config={"segment_len": 32, "context_mode": "none", **SLOTS})
    with torch.no_grad():
        for name, p in opened.model.named_parameters():
            if "local_constructor" in name or "global_integrator" in name:
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * 0.3)
    rows = perplexity.run(opened, tokens.read(data), [128], windows=2)["rows"]
    assert {r["protocol"]: r["valid"] for r in rows} == {"sliding": False, "last": True}
    assert rows[0]["mode"] == "none" and rows[0]["leak"]["leaks"]


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["ppl", "--data", "/nonexistent.bin"], "existing token file"),
        (["passkey", "--lengths", "a"], "--lengths must be numbers"),
        (["passkey", "--lengths", "600", "--depths", "2"], "depth must be between"),
        (["topics", "--method", "fast"], "method must be one of"),
        (["topics", "--seed", "-1"], "seed must be at least 0, got -1"),
        (["passkey", "--seed", "-1"], "seed must be at least 0, got -1"),
        (["topics", "--method", "hici", "--set", "slots=3"], "not a field"),
        (["passkey", "--model", "/nonexistent"], "not a model directory"),
        (["prepare", "/nonexistent.txt", "--out", "x.bin"], "existing file"),
        (["passkey", "--device", "nope"], "device must be a device of this machine, got 'nope'"),
        (["passkey", "--json", "."], "--json must be a file"),
        (["passkey", "--lengths", "99999999"], "length must be one that fits into memory"),
    ],
)
def test_wrong_input_is_one_line(
    arguments: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def too_long(self: Any, length: int, seed: int = 0) -> Any:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 102399998976 bytes.\nAt")

    monkeypatch.setattr(Evaluated, "leak", too_long)
    result = runner.invoke(app, ["eval", *arguments])
    assert result.exit_code == 2 and says in result.stderr, result.output
    assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "error, named",
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to"), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (MemoryError("not enough memory"), False),
    ],
    ids=str,
)
def test_only_want_of_memory_is_the_lengths_fault(error: Exception, named: bool) -> None:
    opened = open_model("demo")

    def refuse(*_: object) -> None:
        raise error

    opened.model.register_forward_pre_hook(refuse)
    calls: list[Any] = [
        lambda: opened.logits(torch.zeros(1, 7, dtype=torch.int64)),
        lambda: opened.describe(7, 0),
        lambda: continue_greedily(opened, [1] * 7, 1),
    ]
    for call in calls:
        with pytest.raises(ValueError if named else type(error), match="got 7: " if named else str(error)[:10]):
            call()
