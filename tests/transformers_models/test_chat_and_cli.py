"""hici chat, merge, extract and convert on small model directories."""

from __future__ import annotations

import json
import signal

import pytest

pytest.importorskip("transformers")

import torch
import transformers as hf
from tiny_models import hici_config, randomise_slots, tiny
from typer.testing import CliRunner

from hici_kernels import HGAConfig
from hici_kernels.cli.checkpoints import fields
from hici_kernels.cli.main import app
from hici_kernels.integrations import apply_hga, apply_hici, save_hici
from hici_kernels.integrations.chat import Conversation, open_model

TEMPLATE = (
    "{% for m in messages %}{{ m['role'][0] }} {{ m['content'] }} e {% endfor %}"
    "{% if add_generation_prompt %}a {% endif %}"
)
WORDS = ["<pad>", "<s>", "<unk>", "u", "a", "e", *(f"w{i}" for i in range(91))]
TEXT = " ".join(f"w{(7 * i) % 91}" for i in range(50))


def save_tokenizer(directory, template=TEMPLATE):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", unk_token="<unk>"
    )
    tokenizer.chat_template = template
    tokenizer.save_pretrained(directory)


@pytest.fixture
def directory(tmp_path):
    tiny().save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    return tmp_path / "model"


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


FEW = {"chunk_size": 8, "group_size": 4, "keep_first": 1, "keep_last": 1, "topk_chunks": 2, "topk_groups": 2}


@pytest.mark.parametrize("method", ["hga", "hici", "none"])
def test_a_conversation_is_the_whole_text(method, directory, tmp_path):
    """Each turn reads only what is new, and answers as if it had read everything at once."""
    adapter = None
    if method == "hici":
        save_hici(randomise_slots(apply_hici(tiny(), hici_config(decode="segment"))), tmp_path / "slots")
        adapter = tmp_path / "slots"
    model, tokenizer = open_model(directory, method, config=FEW if method == "hga" else {}, adapter=adapter)
    talk, turns = Conversation(model, tokenizer), []
    for text in (TEXT, "w3 w4", "w8"):
        pieces: list[str] = []
        turns.append(talk.say(text, max_new_tokens=6, show=pieces.append))
        assert len(pieces) > 2 and "".join(pieces).strip() == turns[-1].text
    for i, turn in enumerate(turns):
        messages = talk.messages[: 2 * i + 1]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")["input_ids"]
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
        assert tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True) == turn.text
        assert turn.prompt_tokens + turn.reused_tokens == ids.shape[1]
        assert turn.new_tokens == 6 and turn.prefill_s > 0 and turn.tokens_per_s > 0
        assert sum(turn.memory.values()) > 0
    assert turns[1].reused_tokens > 50 and turns[1].prompt_tokens < 12
    talk.close()
    assert not any(talk.memory().values())


def test_a_template_that_rewrites_the_past(directory):
    """What the cache holds of it is taken back; where it cannot go back, it starts anew."""
    save_tokenizer(directory, "w{{ messages | length }} " + TEMPLATE)
    model, tokenizer = open_model(directory, "hga", config=FEW)
    talk = Conversation(model, tokenizer)
    talk.say(TEXT, max_new_tokens=4)
    assert talk.say("w1", max_new_tokens=4).reused_tokens == 0
    save_tokenizer(directory, TEMPLATE.replace("m['content']", "m['content'] if loop.last else 'w5'"))
    model, tokenizer = open_model(directory, "hga", config=FEW)
    talk = Conversation(model, tokenizer)
    talk.say(TEXT, max_new_tokens=4)
    second = talk.say("w1 w2", max_new_tokens=4)
    ids = tokenizer.apply_chat_template(talk.messages[:3], add_generation_prompt=True, return_tensors="pt")["input_ids"]
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    assert second.reused_tokens == 1 and tokenizer.decode(out[0, ids.shape[1] :]) == second.text


@pytest.mark.parametrize("method", ["hga", "none"])
def test_a_turn_that_fails_has_not_been(method, directory):
    """The next one answers as if nobody had tried; an answer that is stopped has been, and what was read for it."""
    model, tokenizer = open_model(directory, method, config=FEW if method == "hga" else {})
    talk, plain = Conversation(model, tokenizer), Conversation(model, tokenizer)
    assert talk.say(TEXT, max_new_tokens=4).text == plain.say(TEXT, max_new_tokens=4).text

    def fail(piece):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        talk.say("w1 w2", max_new_tokens=4, show=fail)
    assert talk.messages == plain.messages and not any(talk.memory().values())
    with pytest.raises(ValueError, match="max_new_tokens"):
        talk.say("w1 w2", max_new_tokens=-1)
    assert talk.messages == plain.messages
    expected = plain.say("w3", max_new_tokens=4)
    again = talk.say("w3", max_new_tokens=4)
    assert again.text == expected.text and again.reused_tokens == 0 < expected.reused_tokens
    stopped = talk.say("w4 w5", max_new_tokens=9, stop=iter((False, True)).__next__)
    assert stopped.new_tokens == 2 and stopped.text == " ".join(stopped.text.split()[:2])
    assert talk.say("w6", max_new_tokens=4).reused_tokens > stopped.reused_tokens + 2


def test_interrupts_while_typing(directory, monkeypatch):
    """The first ends the answer that has begun, one before it or a second one the turn; neither the conversation."""
    from hici_kernels.cli import chat

    wait = iter([[False, True], [True]])
    monkeypatch.setattr(chat, "_typed", lambda: iter(["w1", "w2", "w3"]))
    say = Conversation.say

    def interrupted(self, text, *, show, **kwargs):
        points = iter(next(wait, []))

        def shown(piece):
            if next(points, False):
                signal.raise_signal(signal.SIGINT)
            show(piece)

        return say(self, text, show=shown, **kwargs)

    monkeypatch.setattr(Conversation, "say", interrupted)
    handler = signal.getsignal(signal.SIGINT)
    written = directory.parent / "turns.json"
    done = run("chat", "--model", directory, "--max-new-tokens", 6, "--json", written)
    assert done.exit_code == 0 and done.output.count("interrupted") == 1, done.output
    assert signal.getsignal(signal.SIGINT) is handler
    turns = json.loads(written.read_text(encoding="utf-8"))["turns"]
    assert [t["prompt"] for t in turns] == ["w1", "w3"]
    assert [t["new_tokens"] < 6 for t in turns] == [True, False] and not turns[1]["reused_tokens"]


@pytest.mark.parametrize("store", ["device", "host", "disk"])
def test_chat_command(store, directory, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    done = run("chat", "--model", directory, "--method", "hga", "--prompt", "w3 w4", "--prompt", "w5", "--file",
               tmp_path / "text.txt", "--max-new-tokens", 5, "--json", tmp_path / "new" / "out.json", "--store", store,
               "--chart", tmp_path / "new" / "chart",
               *(("--store-set", f"path={tmp_path}") if store == "disk" else ()),
               *(("--store-set", "host_bytes=2e9") if store != "device" else ()),
               *(x for k, v in FEW.items() for x in ("--set", f"{k}={v}")))  # fmt: skip
    assert done.exit_code == 0, done.output
    written = json.loads((tmp_path / "new" / "out.json").read_text(encoding="utf-8"))
    assert (tmp_path / "new" / "chart").read_bytes().startswith(b"\x89PNG")
    assert [t["new_tokens"] for t in written["turns"]] == [5, 5]
    assert written["turns"][0]["prompt_tokens"] > 50 and written["turns"][0]["memory"][store] > 0
    assert "tokens/s" in done.output and f"history in {store}" in done.output
    model, tokenizer = open_model(directory, "none")
    apply_hga(model, HGAConfig(**FEW))
    answer = Conversation(model, tokenizer).say(f"{TEXT}\n\nw3 w4", max_new_tokens=5).text
    assert answer == written["turns"][0]["text"] and answer in done.output


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--model", "nowhere"), "no config.json"),
        (("--model", "{model}", "--method", "magic"), "method must be"),
        (("--model", "{model}", "--store", "tape"), "store must be"),
        (("--model", "{model}", "--set", "keep_first"), "name=value"),
        (("--model", "{model}", "--set", "slots=3"), "not a field of HGAConfig"),
        (("--model", "{model}", "--method", "hici"), "says nothing of slots"),
        (("--model", "{model}", "--store-set", "foo=1"), "'foo' is not an option of KVStore"),
        (("--model", "{model}", "--store-set", "host_bytes"), "--store-set takes name=value"),
        (("--model", "{model}", "--store", "host", "--store-set", "host_bytes=2.5"), "host_bytes must be an int"),
        (("--model", "{model}", "--store", "disk"), "path must be given"),
        (("--model", "{model}", "--method", "none", "--store-set", "host_bytes=5"), "host_bytes is an option of the"),
        (("--model", "{model}", "--device", "nope"), "device must be a device of this machine, got 'nope'"),
        (("--model", "{model}", "--temperature", "-1"), "--temperature must not be negative, got -1.0"),
        (("--model", "{model}", "--temperature", "nan"), "--temperature must be finite"),
        (("--model", "{model}", "--max-new-tokens", "0"), "--max-new-tokens must be at least 1"),
        (("--model", "{model}", "--file", "{model}/absent"), "absent"),
        (("--model", "{model}", "--json", "{model}"), "--json must be a file"),
        (("--model", "{model}", "--json", "{model}/config.json/x"), "--json must be in a folder that can be made"),
        (("--model", "{model}", "--chart", "{model}/x.xyz"), "--chart must end with .png"),
    ],
)
def test_chat_refusals(arguments, message, directory, monkeypatch):
    if message != "says nothing of slots":
        monkeypatch.setattr(hf.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("was read"))
    done = run("chat", "--prompt", "w1", *(a.replace("{model}", str(directory)) for a in arguments))
    assert done.exit_code == 2 and message in done.output.replace("\n", " ")


@pytest.mark.parametrize(
    "written, value",
    [("2e9", 2 * 10**9), ("1.5E3", 1500), ("12345678901234567e2", 1234567890123456700), ("-1e2", -100), ("7", 7),
     ("1e-3", 1e-3), ("2.0", 2.0), ("1.25e1", 12.5), ("true", True), ("null", None), ("host", "host"),
     ("[1e2]", [100])],
)  # fmt: skip
def test_values_of_name_value_options(written, value):
    found = fields([f"name={written}"])["name"]
    assert found == value and type(found) is type(value)


def test_merge_extract_convert_commands(directory, tmp_path):
    model = randomise_slots(apply_hici(tiny(), hici_config()))
    expected = model(torch.arange(3, 43)[None]).logits
    (tmp_path / "run").mkdir()
    torch.save({f"base_model.model.{k}": v for k, v in model.state_dict().items()}, tmp_path / "run/pytorch_model.bin")
    done = run("extract", tmp_path / "run", tmp_path / "slots")
    assert done.exit_code == 0 and "42 tensors" in done.output, done.output
    torch.save({"a": torch.zeros(2)}, tmp_path / "a.bin")
    assert run("convert", tmp_path / "a.bin", "--remove").exit_code == 0
    assert (tmp_path / "a.safetensors").is_file() and not (tmp_path / "a.bin").exists()
    assert run("convert", tmp_path / "a.bin").exit_code == 2
    said = [
        x for v in ("num_heads=4", "context_mode=causal_shift", "segment_len=8", "rope_factor=1") for x in ("--set", v)
    ]
    done = run("merge", directory, tmp_path / "slots", tmp_path / "kept")
    assert done.exit_code == 2 and "num_heads" in done.output
    assert run("merge", directory, tmp_path / "slots", tmp_path / "kept", "--keep-slots", *said).exit_code == 0
    assert run("merge", directory, tmp_path / "slots", tmp_path / "dropped", *said).exit_code == 0
    kept = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "kept")
    assert float((kept(torch.arange(3, 43)[None]).logits - expected).abs().max()) < 1e-5
    assert type(hf.AutoModelForCausalLM.from_pretrained(tmp_path / "dropped").config) is hf.LlamaConfig
    done = run("chat", "--model", tmp_path / "kept", "--method", "hici", "--prompt", "w1", "--max-new-tokens", 2)
    assert done.exit_code == 0, done.output
