"""hici train and sft on tiny models: what is trained, at which rate, clipped how; packing; kill and resume."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("peft")

import tokenizers
import torch
import transformers as hf
from test_chat_and_cli import WORDS
from tiny_models import hici_config, prompt, randomise_slots, tiny, worst
from torch import nn
from typer.testing import CliRunner

from hici_kernels.checkpoints import names
from hici_kernels.cli.main import app
from hici_kernels.integrations import apply_hici, load_hici
from hici_kernels.train import ENGINES, Recipe, engine_file, run
from hici_kernels.train.data import IGNORED, PackedRows, collate, prepare
from hici_kernels.train.groups import MARK, HiCIClip, parameter_groups
from hici_kernels.train.model import build, rope_factor
from hici_kernels.train.run import last_complete
from hici_kernels.train.trainer import HiCITrainer

SLOTS = {"num_local_slots": 5, "global_slots": 3, "num_heads": 4, "bottleneck_dim": 16, "shared_compress_dim": 8,
         "segment_len": 8}  # fmt: skip
SMALL = {"context": 64, "hici": SLOTS, "max_steps": 6, "accumulation": 2, "warmup_steps": 2, "save_steps": 2,
         "hici_grad_clip": 0.05, "learning_rate": 1e-3, "hici_lr": 1e-2}  # fmt: skip


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    lines = [" ".join(f"w{(7 * i * j + j) % 90}" for i in range(5 + 13 * j % 37)) for j in range(40)]
    path.write_text("\n".join(json.dumps({"text": line}) for line in lines), encoding="utf-8")
    return path


def metrics(out: Path) -> list[dict[str, float]]:
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [entry for entry in map(json.loads, lines) if "loss" in entry]


def test_a_run_does_what_the_recipe_says(model_directory, texts, tmp_path):
    """Realised rates and clipped norms, warm-up, what moved and what did not, and the checkpoint at the end."""
    recipe = Recipe(**SMALL)
    before, _ = build(model_directory, recipe)
    done = run(model_directory, [texts], tmp_path / "out", recipe)
    lines = metrics(tmp_path / "out")
    assert done["step"] == 6 and [entry["step"] for entry in lines] == list(range(1, 7))
    assert [entry["learning_rate"] for entry in lines] == pytest.approx([0, 5e-4, 1e-3, 1e-3, 1e-3, 1e-3])
    assert [entry["hici_lr"] for entry in lines] == pytest.approx([0, 5e-3, 1e-2, 1e-2, 1e-2, 1e-2])
    for entry in lines:
        assert entry["hici_grad_norm"] > 0
        assert entry["hici_grad_norm_clipped"] == pytest.approx(min(0.05, entry["hici_grad_norm"]), rel=1e-4)
    assert max(entry["hici_grad_norm"] for entry in lines) > 0.05

    loaded = load_hici(hf.AutoModelForCausalLM.from_pretrained(model_directory), done["result"])
    rows = PackedRows(next((tmp_path / "out" / "data").glob("*")), recipe, 8)
    batch = collate([rows[i] for i in range(len(rows))])
    with torch.no_grad():
        assert loaded.eval()(**batch, use_cache=False).loss < before.eval()(**batch, use_cache=False).loss - 0.05
    after = {names.canonical(n): p for n, p in loaded.named_parameters()}
    moved = {}
    for name, p in before.named_parameters():
        moved[name] = not torch.equal(p, after[names.canonical(name)])
    trained = [n for n, p in before.named_parameters() if p.requires_grad]
    assert sum("lora_" in n for n in trained) == 2 * 24
    for name in moved:
        wanted = "lora_" in name or any(p in name for p in ("embed", "norm", "local_constructor", "global_integrator"))
        assert wanted == (name in trained), name
        assert moved[name] == wanted, name


def test_the_result_is_the_trained_model(model_directory, texts, tmp_path):
    done = run(model_directory, [texts], tmp_path / "out", Recipe(**{**SMALL, "max_steps": 2}))
    loaded = load_hici(hf.AutoModelForCausalLM.from_pretrained(model_directory), done["result"])
    again = load_hici(hf.AutoModelForCausalLM.from_pretrained(model_directory), tmp_path / "out" / "checkpoint-2")
    ids = prompt()
    with torch.no_grad():
        assert torch.equal(loaded(ids, use_cache=False).logits, again(ids, use_cache=False).logits)
    assert loaded.config.hici["segment_len"] == 8
    assert loaded.get_input_embeddings().weight.shape[0] == len(WORDS) + 1  # </s> was missing


def test_a_finished_run_given_again_changes_nothing(model_directory, texts, tmp_path):
    recipe = Recipe(**{**SMALL, "max_steps": 2})
    first = run(model_directory, [texts], tmp_path / "out", recipe)
    weights = tmp_path / "out" / "hici" / "trainable_params.safetensors"
    held = weights.read_bytes()
    again = run(model_directory, [texts], tmp_path / "out", recipe)
    assert again == first and first["step"] == 2 and weights.read_bytes() == held


@pytest.mark.parametrize("changes", [{"lora_r": 0}, {"trainable": ["norm", "lm_head", "mlp.down_proj"]}])
def test_what_else_the_recipe_trains_is_kept(changes, model_directory, texts, tmp_path):
    """Every parameter, or some that no published checkpoint has: in the result, and where a run goes on."""
    out = tmp_path / "out"
    recipe = Recipe(**{**SMALL, **changes, "max_steps": 4})
    done = run(model_directory, [texts], out, recipe)
    model, _ = build(model_directory, recipe)
    begun = {n: p.detach().clone() for n, p in model.named_parameters()}
    HiCITrainer._load_from_checkpoint(trainer_of(model, recipe, tmp_path), str(out / "checkpoint-4"))
    after = dict(model.named_parameters())
    moved = {n for n, p in after.items() if not torch.equal(p, begun[n])}
    others = {n for n in after if "mlp.down_proj" in n and "lora" not in n} | {"lm_head.weight"}
    assert others < moved
    loaded = load_hici(hf.AutoModelForCausalLM.from_pretrained(model_directory), done["result"])
    assert worst(loaded(prompt(), use_cache=False).logits, model.eval()(prompt(), use_cache=False).logits) < 1e-5
    (out / "checkpoint-4" / "trainer_state.json").unlink()  # as if killed while it was written
    before = metrics(out)
    again = run(model_directory, [texts], out, recipe)
    assert again["step"] == 4 and [e["step"] for e in metrics(out)] == [1, 2, 3, 4]
    assert [e["loss"] for e in metrics(out)] == pytest.approx([e["loss"] for e in before], rel=1e-5)


def trainer_of(model, recipe, out):
    return HiCITrainer(model, recipe, hf.TrainingArguments(output_dir=str(out), use_cpu=True, report_to=[]))


def test_a_folder_belongs_to_one_run(model_directory, texts, tmp_path):
    out, recipe = tmp_path / "out", {**SMALL, "max_steps": 2}
    run(model_directory, [texts], out, Recipe(**recipe))
    held = (out / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match="checkpoints of an earlier run"):
        run(model_directory, [texts], out, Recipe(**recipe), resume=False)
    with pytest.raises(ValueError, match=r"learning_rate = 0.001, this one has 0.5"):
        run(model_directory, [texts], out, Recipe(**{**recipe, "learning_rate": 0.5}))
    more = tmp_path / "more.txt"
    more.write_text("w1 w2 w3", encoding="utf-8")
    with pytest.raises(ValueError, match="data = "):
        run(model_directory, [texts, more], out, Recipe(**recipe))
    torch.save({}, out / "checkpoint-2" / "rng_state_0.pth")
    (out / "checkpoint-2" / "rng_state.pth").rename(out / "checkpoint-2" / "rng_state_1.pth")
    with pytest.raises(ValueError, match="are of 2 processes, this run has 1"):
        run(model_directory, [texts], out, Recipe(**recipe))
    assert (out / "metrics.jsonl").read_bytes() == held
    assert json.loads((out / "recipe.json").read_text(encoding="utf-8"))["learning_rate"] == 1e-3


def test_a_tokenizer_with_other_rules_has_other_rows(model_directory, texts, tmp_path):
    _, tokenizer = build(model_directory, Recipe(**SMALL))
    first = prepare([texts], "text", tokenizer, Recipe(**SMALL), tmp_path)
    assert prepare([texts], "text", tokenizer, Recipe(**SMALL), tmp_path) == first
    tokenizer.backend_tokenizer.normalizer = tokenizers.normalizers.Lowercase()
    assert prepare([texts], "text", tokenizer, Recipe(**SMALL), tmp_path) != first


COMMAND = """
import sys, torch
torch.set_num_threads(1)
from hici_kernels.cli.main import app
app(sys.argv[1:])
"""


def launch(*arguments, **environment):
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, env={**os.environ, "OMP_NUM_THREADS": "1", **environment}, start_new_session=True,
    )  # fmt: skip


@pytest.mark.slow
def test_kill_and_resume_give_the_same_curve(model_directory, texts, tmp_path):
    """SIGKILL after a checkpoint, a half-written later one besides: the curve is that of a run left alone."""
    recipe = Recipe(**{**SMALL, "max_steps": 12, "mixed_segments": [8, 16, 32]})
    run(model_directory, [texts], tmp_path / "whole", recipe)
    expected = metrics(tmp_path / "whole")
    (tmp_path / "recipe.json").write_text(json.dumps(recipe.to_dict()), encoding="utf-8")
    arguments = ("train", "--model", model_directory, "--data", texts, "--out", tmp_path / "out", "--recipe",
                 tmp_path / "recipe.json")  # fmt: skip
    process = launch(*arguments)
    until = time.monotonic() + 400

    def newest() -> int:
        found = last_complete(tmp_path / "out", 1)
        return 0 if found is None else int(found.name.rsplit("-", 1)[1])

    # the file that ends a checkpoint is there before all of it is
    while newest() < 4 and process.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    output = process.communicate()[0]
    assert newest() >= 4, output
    assert process.returncode == -signal.SIGKILL, "the run ended before it could be killed"
    assert not (tmp_path / "out" / "hici").exists()
    torn = tmp_path / "out" / "checkpoint-10"
    torn.mkdir(exist_ok=True)
    (torn / "trainer_state.json").unlink(missing_ok=True)
    with open(tmp_path / "out" / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 5, "lo')
    assert 4 <= newest() < 10
    run(model_directory, [texts], tmp_path / "out", recipe)
    found = metrics(tmp_path / "out")
    assert [entry["step"] for entry in found] == list(range(1, 13))
    for a, b in zip(found, expected, strict=True):
        for key in ("loss", "grad_norm", "learning_rate", "hici_lr", "hici_grad_norm", "hici_grad_norm_clipped"):
            assert a[key] == pytest.approx(b[key], rel=1e-5, abs=1e-7), (a["step"], key)


def test_packing_keeps_documents_apart(model_directory, texts, tmp_path):
    """Every token once, boundaries at every document; the packed loss is that of the documents alone."""
    recipe = Recipe(**SMALL)
    model, tokenizer = build(model_directory, recipe)
    randomise_slots(model)
    folder = prepare([texts], "text", tokenizer, recipe, tmp_path)
    assert prepare([texts], "text", tokenizer, recipe, tmp_path) == folder
    rows = PackedRows(folder, recipe, 8)
    batch = collate([rows[0], rows[1]])
    cu = batch["cu_seq_lens_q"].tolist()
    assert batch["input_ids"].shape[1] == cu[-1] <= 128 and len(cu) > 3
    assert all(int(batch["labels"][0, c]) == IGNORED for c in cu[:-1])
    assert batch["total_segments"] == sum(-(-(b - a) // 8) for a, b in pairwise(cu))
    held = [list(rows[i]["input_ids"]) for i in range(len(rows))]
    lines = [json.loads(line)["text"] for line in texts.read_text(encoding="utf-8").splitlines()]
    whole = [i for line in lines for i in [*tokenizer(line)["input_ids"], tokenizer.eos_token_id]]
    found = [int(i) for row in held for i in row]
    assert len(whole) - len(found) < len(rows) and all(len(row) <= 64 for row in held)
    with torch.no_grad():
        packed = model(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=False).logits
        for a, b in pairwise(cu):
            alone = model(batch["input_ids"][:, a:b], use_cache=False).logits
            assert worst(packed[:, a:b], alone) < 1e-4


def test_answers_alone_are_learned(model_directory, tmp_path):
    entries = [{"instruction": f"w{i} w5", "output": "w1 w2 w3", "input": "w9" if i else ""} for i in range(9)]
    entries.append({"instruction": "w1 " * 80, "output": "w2"})
    path = tmp_path / "answers.json"
    path.write_text(json.dumps(entries), encoding="utf-8")
    recipe = Recipe(**SMALL)
    _, tokenizer = build(model_directory, recipe)
    rows = PackedRows(prepare([path], "answers", tokenizer, recipe, tmp_path / "data"), recipe, 8)
    assert rows.meta["documents"] == 10 and rows.meta["longer_than_a_row"] == 1
    row = rows[0]
    for a, b in zip(row["starts"], [*row["starts"][1:], len(row["labels"])], strict=True):
        learned = row["labels"][a:b]
        answer = [*tokenizer("w1 w2 w3", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        assert learned[learned != IGNORED].tolist() == answer
        assert learned[-4:].tolist() == answer


def test_sft_command_from_a_checkpoint(model_directory, texts, tmp_path, monkeypatch):
    """hici train, then hici sft on its result: slots, their segments, LoRA and tokens go on."""
    lengths, get = set(), PackedRows.__getitem__

    def spy(rows, i):
        lengths.add((row := get(rows, i))["segment_len"])
        return row

    monkeypatch.setattr(PackedRows, "__getitem__", spy)
    path = tmp_path / "answers.jsonl"
    path.write_text("\n".join(json.dumps({"instruction": f"w{i}", "output": f"w{i + 1} w2"}) for i in range(30)))
    settings = [x for k, v in {**SMALL, "max_steps": 2}.items() for x in ("--set", f"{k}={json.dumps(v)}")]
    first = CliRunner().invoke(app, ["train", "--model", str(model_directory), "--data", str(texts), "--out",
                                     str(tmp_path / "a"), *settings])  # fmt: skip
    assert first.exit_code == 0, first.output
    arguments = ["sft", "--model", str(model_directory), "--data", str(path), "--out", str(tmp_path / "b"),
                 "--adapter", str(tmp_path / "a" / "hici"), "--json", str(tmp_path / "new" / "b.json"),
                 "--chart", str(tmp_path / "new" / "b.png"), *settings,
                 "--set", "hici={}", "--set", "context=128"]  # fmt: skip
    second = CliRunner().invoke(app, arguments)
    assert second.exit_code == 0, second.output
    done = json.loads((tmp_path / "new" / "b.json").read_text(encoding="utf-8"))
    assert (tmp_path / "new" / "b.png").read_bytes().startswith(b"\x89PNG")
    loaded = load_hici(hf.AutoModelForCausalLM.from_pretrained(model_directory), done["result"])
    assert sum("lora_" in n for n, _ in loaded.named_parameters()) == 2 * 24
    assert loaded.config.hici["num_local_slots"] == 5 and loaded.config.hici["segment_len"] == 8
    assert lengths == {8}
    saved = tmp_path / "a" / "hici" / "hici_config.json"
    content = json.loads(saved.read_text(encoding="utf-8"))
    content["hici"] |= {"segment_len": None, "num_segments": 4}
    saved.write_text(json.dumps(content), encoding="utf-8")
    third = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "c")])
    assert third.exit_code != 0 and "cuts texts by num_segments" in third.output


@pytest.mark.parametrize("reentrant", [True, False])
def test_mixed_segments_under_gradient_checkpointing(reentrant):
    """The length drawn for a batch goes with the call, so recomputation cuts every layer as the loss did."""
    model, ids = randomise_slots(apply_hici(tiny(), hici_config())).train(), prompt(1, 40)

    def gradients(length):
        model.zero_grad()
        model(ids, labels=ids, use_cache=False, hici_segment_len=length).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters()}

    plain = {n: gradients(n) for n in (4, 8, 20)}
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    for length, expected in plain.items():
        found = gradients(length)
        assert all(torch.equal(found[n], expected[n]) for n in expected)
    model.gradient_checkpointing_disable()
    other = randomise_slots(apply_hici(tiny(), hici_config(segment_len=20))).eval()
    with torch.no_grad():
        found = model.eval()(ids, use_cache=False, hici_segment_len=20).logits
        assert worst(found, other(ids, use_cache=False).logits) < 1e-5
        assert worst(found, model(ids, use_cache=False).logits) > 1e-2
        with pytest.raises(ValueError, match="hici_segment_len is for training"):
            model(ids, hici_segment_len=20)


def test_mixed_segments_are_drawn_by_row(model_directory, texts, tmp_path):
    recipe = Recipe(**{**SMALL, "mixed_segments": [8, 16, 32]})
    _, tokenizer = build(model_directory, recipe)
    rows = PackedRows(prepare([texts], "text", tokenizer, recipe, tmp_path), recipe, 8)
    drawn = [rows[i]["segment_len"] for i in range(len(rows))]
    assert drawn == [rows[i]["segment_len"] for i in range(len(rows))] and len(set(drawn)) == 3


def clipped_by(limit, partitioned=False):
    """An optimizer over two marked and one unmarked parameter with known gradients, after its hook."""
    parameters = [nn.Parameter(torch.zeros(4)) for _ in range(3)]
    clip = HiCIClip(limit, partitioned)
    optimizer = torch.optim.SGD(
        [{"params": parameters[:1], "lr": 1.0, MARK: False}, {"params": parameters[1:], "lr": 1.0, MARK: True}]
    )
    clip.attach(optimizer)
    for i, p in enumerate(parameters):
        p.grad = torch.full((4,), float(i + 1))
    optimizer.step()
    return clip, parameters


def test_the_clip_acts_on_marked_parameters_alone():
    norm = (4 * 4 + 4 * 9) ** 0.5
    clip, (host, *slots) = clipped_by(1.0)
    assert torch.equal(host, torch.full((4,), -1.0))
    assert torch.cat([p.detach() for p in slots]).norm() == pytest.approx(1.0, rel=1e-5)
    assert clip.measured() == pytest.approx({"hici_lr": 1.0, "hici_grad_norm": norm, "hici_grad_norm_clipped": 1.0},
                                            rel=1e-5)  # fmt: skip
    clip.take()
    with pytest.raises(RuntimeError, match="0 times"):
        clip.take()
    for limit in (None, 100.0):
        clip, (_, *slots) = clipped_by(limit)
        assert torch.equal(slots[1], torch.full((4,), -3.0))
        assert clip.measured()["hici_grad_norm_clipped"] == pytest.approx(norm)


def test_groups():
    model = apply_hici(tiny(), hici_config())
    host, slots = parameter_groups(model.named_parameters(), 1e-3, 1e-2, 0.0)
    assert (host["lr"], slots["lr"], host[MARK], slots[MARK]) == (1e-3, 1e-2, False, True)
    assert len(slots["params"]) == 2 * 18 and len(host["params"]) == len(list(model.parameters())) - 2 * 18
    with pytest.raises(ValueError, match="no trainable parameter of local_constructor"):
        parameter_groups(tiny().named_parameters(), 1e-3, 1e-2, 0.0)


def test_rope_rule():
    """Published factors: Llama-3-8B 8K to 32K is 4; Qwen3 40,960 to 49,152 is 1.2; never below 1."""
    assert rope_factor("llama", 8192, 1.0, Recipe(context=32768)) == 4
    assert rope_factor("llama", 4096, 1.0, Recipe(context=9000)) == 3
    assert rope_factor("qwen3", 40960, 1.0, Recipe(context=49152)) == pytest.approx(1.2)
    assert rope_factor("qwen3", 40960, 1.0, Recipe(context=1024)) == 1
    assert rope_factor("llama", 4096, 1.0, Recipe(context=9000, rope_factor=5.0)) == 5


@pytest.mark.parametrize(
    "values, message",
    [
        ({"context": 1}, "context"),
        ({"hici_grad_clip": 0.0}, "hici_grad_clip must be positive or None"),
        ({"mixed_segments": "8"}, "mixed_segments must be a list"),
        ({"hici": {"num_segments": 4}}, "needs a segment_len"),
        ({"hici": {"slots": 4}}, "slots"),
        ({"template": "x"}, "instruction"),
        ({"template": "{instruction} {}"}, "its only field"),
        ({"template": "{instruction} {"}, "its only field"),
        ({"template": 5}, "its only field"),
        ({"weight_decay": -0.1}, "weight_decay must not be negative"),
        ({"gradient_checkpointing": "False"}, "gradient_checkpointing must be a bool"),
        ({"special_tokens": 0}, "special_tokens must be a bool"),
        ({"trainable": [""]}, "trainable must list names"),
        ({"lora_targets": [3]}, "lora_targets must list names"),
        ({"learning_rat": 1.0}, "not a field of Recipe"),
    ],
)
def test_bad_recipes(values, message):
    with pytest.raises((ValueError, TypeError), match=message):
        Recipe.from_dict(values)


def test_refusals_come_before_training(model_directory, texts, tmp_path):
    recipe = Recipe(**SMALL)
    with pytest.raises(ValueError, match=r"no config\.json"):
        run(tmp_path, [texts], tmp_path / "out", recipe)
    with pytest.raises(ValueError, match="engine must be"):
        run(model_directory, [texts], tmp_path / "out", recipe, engine="zero9")
    with pytest.raises(FileNotFoundError):
        run(model_directory, [tmp_path / "none.jsonl"], tmp_path / "out", recipe)
    with pytest.raises(ValueError, match="fsdp2 needs dtype float32"):
        run(model_directory, [texts], tmp_path / "out", Recipe(**SMALL, dtype="bfloat16"), engine="fsdp2")
    (tmp_path / "bad.jsonl").write_text('{"txt": "w1"}\n', encoding="utf-8")
    with pytest.raises(ValueError, match="text field 'text'"):
        run(model_directory, [tmp_path / "bad.jsonl"], tmp_path / "out", recipe)
    assert not list((tmp_path / "out").glob("checkpoint-*"))


def test_engine_files():
    """Shipped, and none with an optimizer or scheduler of its own, which would ignore the recipe's."""
    for name in ENGINES:
        path = engine_file(name)
        if path is None:
            continue
        content = json.loads(path.read_text(encoding="utf-8"))
        assert not {"optimizer", "scheduler"} & set(content)
        if name == "fsdp2":
            assert content["version"] == 2 and content["state_dict_type"] == "SHARDED_STATE_DICT"
        else:
            assert content["zero_optimization"]["stage"] == int(name[-1])
            assert "offload_optimizer" not in content["zero_optimization"]


def test_a_step_past_the_clip_is_an_error(model_directory, texts, tmp_path):
    """An engine that swaps the optimizer for its own would otherwise train without the clip, silently."""
    recipe = Recipe(**{**SMALL, "max_steps": 1})
    model, tokenizer = build(model_directory, recipe)
    rows = PackedRows(prepare([texts], "text", tokenizer, recipe, tmp_path / "data"), recipe, 8)
    args = hf.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=1,
        use_cpu=True,
        report_to=[],
        remove_unused_columns=False,
        save_strategy="no",
    )
    trainer = HiCITrainer(model, recipe, args, train_dataset=rows, data_collator=collate)
    trainer.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    with pytest.raises(RuntimeError, match="passed HiCI's parameters 0 times"):
        trainer.train()


WORKER = """
import json, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from hici_kernels.train import Recipe, run
model, data, out, engine, recipe = sys.argv[1:]
run(model, [data], out, Recipe.from_dict(json.loads(recipe)), engine=engine)
"""


def several(engine, model_directory, texts, out, recipe, processes=2):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = out.parent / f"{out.name}.py"
    script.write_text(WORKER, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", str(port),
         str(script), str(model_directory), str(texts), str(out), engine, json.dumps(recipe)],
        text=True, capture_output=True, timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["plain", "fsdp2", "zero2", "zero3"])
def test_two_processes_equal_one(engine, model_directory, texts, tmp_path):
    """Same rows a step: the same losses, rates, norms and weights; interrupted after two steps and resumed besides."""
    if engine.startswith("zero"):
        pytest.importorskip("deepspeed")
    recipe = {**SMALL, "max_steps": 4, "mixed_segments": [8, 16]}
    run(model_directory, [texts], tmp_path / "one", Recipe.from_dict({**recipe, "accumulation": 2}))
    shared = {**recipe, "accumulation": 1}
    # transformers 5.14 loads the optimizer of several CPU processes to "cpu:0", which torch refuses
    if tuple(map(int, hf.__version__.split(".")[:2])) >= (5, 23):
        several(engine, model_directory, texts, tmp_path / "two", {**shared, "max_steps": 2})
    several(engine, model_directory, texts, tmp_path / "two", shared)
    found, expected = metrics(tmp_path / "two"), metrics(tmp_path / "one")
    assert [entry["step"] for entry in found] == [1, 2, 3, 4]
    for a, b in zip(found, expected, strict=True):
        for key in ("loss", "grad_norm", "learning_rate", "hici_lr", "hici_grad_norm", "hici_grad_norm_clipped"):
            assert a[key] == pytest.approx(b[key], rel=1e-4), (a["step"], key)
    base = hf.AutoModelForCausalLM.from_pretrained(model_directory)
    other = hf.AutoModelForCausalLM.from_pretrained(model_directory)
    with torch.no_grad():
        one, two = (load_hici(m, tmp_path / n / "hici") for m, n in ((base, "one"), (other, "two")))
        assert worst(one(prompt(), use_cache=False).logits, two(prompt(), use_cache=False).logits) < 1e-3
