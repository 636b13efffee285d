"""What a run takes over from a folder and from a checkpoint, and what it refuses before anything is trained."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("peft")

import torch
import transformers as hf
from safetensors.torch import load_file
from test_chat_and_cli import save_tokenizer
from test_train import SMALL, metrics
from tiny_models import worst
from tokenizers import processors
from trained_models import logits
from typer.testing import CliRunner

from hici_kernels.checkpoints import extract, names
from hici_kernels.cli.main import app
from hici_kernels.integrations import load_hici
from hici_kernels.train import Recipe, run
from hici_kernels.train.data import PackedRows, prepare
from hici_kernels.train.model import build

FEW = {**SMALL, "max_steps": 2}


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "texts.txt"
    path.write_text(" ".join(f"w{7 * i % 90}" for i in range(900)), encoding="utf-8")
    return path


def test_a_loss_that_is_no_number_ends_the_run(model_directory, texts, tmp_path):
    recipe = {**SMALL, "learning_rate": 1e30, "hici_lr": 1e30, "max_grad_norm": None, "hici_grad_clip": None}
    with pytest.raises(ValueError, match=r"the loss is nan at step \d: .*learning_rate"):
        run(model_directory, [texts], tmp_path, Recipe(**recipe))
    assert not math.isfinite(metrics(tmp_path)[-1]["loss"]) and math.isfinite(metrics(tmp_path)[0]["loss"])
    assert not (tmp_path / "hici").exists()


def test_a_run_goes_on_with_the_same_model_checkpoint_and_data(model_directory, texts, tmp_path):
    out, same = tmp_path / "out", Recipe(**FEW)
    run(model_directory, [texts], out, same)
    held = (out / "metrics.jsonl").read_bytes()
    other = hf.AutoModelForCausalLM.from_pretrained(model_directory)
    with torch.no_grad():
        next(other.parameters()).add_(1)
    other.save_pretrained(tmp_path / "other")
    save_tokenizer(tmp_path / "other")
    with pytest.raises(ValueError, match="a run with model = "):
        run(tmp_path / "other", [texts], out, same)
    with pytest.raises(ValueError, match="a run with checkpoint = None"):
        run(model_directory, [texts], out, same, checkpoint=out / "hici")
    words = texts.read_text(encoding="utf-8").split()
    swapped = tmp_path / "swapped.txt"
    swapped.write_text(" ".join([words[1], words[0], *words[2:]]), encoding="utf-8")
    with pytest.raises(ValueError, match="a run with data = "):
        run(model_directory, [swapped], out, same)
    assert (out / "metrics.jsonl").read_bytes() == held
    moved = tmp_path / "moved.txt"
    moved.write_bytes(texts.read_bytes())
    assert run(model_directory, [moved], out, Recipe(**{**FEW, "max_steps": 3}))["step"] == 3
    # what a run has used can be given to another as its recipe
    given = ["--model", model_directory, "--data", texts, "--out", tmp_path / "new", "--recipe", out / "recipe.json"]
    done = CliRunner().invoke(app, ["train", *map(str, given), "--set", "max_steps=1"])
    assert done.exit_code == 0, done.output


def test_lora_is_that_of_the_checkpoint_or_added(model_directory, texts, tmp_path):
    first = run(model_directory, [texts], tmp_path / "lora", Recipe(**FEW))["result"]
    for wrong, message in (
        ({"lora_r": 4}, "lora_r must be 8"),
        ({"lora_r": 0}, "lora_r must be 8"),
        ({"lora_alpha": 8}, "lora_alpha must be 16"),
        ({"lora_targets": ["q_proj"]}, "lora_targets must be"),
        ({"rope_factor": 3.0}, "rope_factor must be None or 1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            run(model_directory, [texts], tmp_path / "b", Recipe(**{**FEW, "hici": {}, **wrong}), checkpoint=first)
    everything = run(model_directory, [texts], tmp_path / "all", Recipe(**FEW, lora_r=0))["result"]
    assert any("mlp" in name for name in load_file(f"{everything}/trainable_params.safetensors"))
    added = run(model_directory, [texts], tmp_path / "c", Recipe(**FEW | {"hici": {}}), checkpoint=everything)["result"]
    assert len(load_file(f"{added}/adapter_model.safetensors")) == 2 * 24
    # what a run without LoRA writes does not go beside another's adapter
    with pytest.raises(ValueError, match="must hold no other adapter"):
        for path in (tmp_path / "lora").glob("checkpoint-*"):
            path.rename(tmp_path / path.name)
        run(model_directory, [texts], tmp_path / "lora", Recipe(**FEW, lora_r=0))


def test_a_checkpoint_is_not_rounded_to_the_dtype_of_frozen_weights(model_directory, texts, tmp_path):
    recipe = {**FEW, "lora_r": 8}
    saved = run(model_directory, [texts], tmp_path / "a", Recipe(**recipe))["result"]
    model, _ = build(model_directory, Recipe(**{**recipe, "hici": {}}, dtype="bfloat16"), checkpoint=Path(saved))
    held = load_file(f"{saved}/trainable_params.safetensors")
    parameters = {str(names.canonical(name)): p for name, p in model.named_parameters()}
    assert all(torch.equal(parameters[name], x) for name, x in held.items())
    assert any(not torch.equal(x, x.bfloat16().float()) for x in held.values())
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for n, p in model.named_parameters() if not p.requires_grad} == {torch.bfloat16}
    with pytest.raises(ValueError, match="precision must be 'bfloat16' or None with dtype 'bfloat16'"):
        Recipe(**SMALL, dtype="bfloat16", precision="float32")
    assert run(model_directory, [texts], tmp_path / "b", Recipe(**recipe, dtype="bfloat16"))["step"] == 2


def test_texts_end_once(model_directory, tmp_path):
    """Whatever the tokenizer adds by itself."""
    recipe = Recipe(**SMALL)
    _, tokenizer = build(model_directory, recipe)
    ends = [("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=ends
    )
    (tmp_path / "a.txt").write_text("w1 w2", encoding="utf-8-sig")
    (tmp_path / "a.jsonl").write_text('{"instruction": "w1", "output": "w2 w3"}', encoding="utf-8-sig")
    for name, kind in (("a.txt", "text"), ("a.jsonl", "answers")):
        rows = PackedRows(prepare([tmp_path / name], kind, tokenizer, recipe, tmp_path / "data"), recipe, 8)
        ids = rows[0]["input_ids"].tolist()
        assert ids.count(tokenizer.eos_token_id) == 1 and ids[-1] == tokenizer.eos_token_id
        assert ids[0] == tokenizer.bos_token_id


@pytest.mark.parametrize("wrong", [{"trainable": ["embd"]}, {"lora_targets": ["q_proj", "q_poj"]}])
def test_names_of_nothing_are_refused(wrong, model_directory, texts, tmp_path):
    (field,) = wrong
    with pytest.raises(ValueError, match=f"{field} has '{wrong[field][-1]}'"):
        run(model_directory, [texts], tmp_path, Recipe(**{**FEW, **wrong}))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"\xff\xfe", r"a\.txt must be UTF-8"),
        ("a.json", b"[{", r"a\.json is not JSON"),
        ("a.jsonl", b'{"text": "w1"}\n{"text": "\xff"}', r"a\.jsonl, line 2 is not JSON"),
    ],
)
def test_data_that_cannot_be_read_is_named(name, content, message, model_directory, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        run(model_directory, [tmp_path / name], tmp_path / "out", Recipe(**FEW))


def test_loaded_as_it_was_trained(model_directory, texts, tmp_path):
    """A run without LoRA, extracted again from its checkpoint: everything it trained is there."""
    done = run(model_directory, [texts], tmp_path / "run", Recipe(**FEW, lora_r=0))
    extract(tmp_path / "run" / "checkpoint-2", tmp_path / "again")
    plain = [
        load_hici(hf.AutoModelForCausalLM.from_pretrained(model_directory), d)
        for d in (done["result"], tmp_path / "again")
    ]
    assert worst(*(logits(model) for model in plain)) == 0
