"""apply_hici: the numbers of the reference fixtures and of HiCIAttention, in whole models."""

from __future__ import annotations

import copy
import json

import pytest

pytest.importorskip("transformers")

import torch
import transformers as hf
from safetensors.torch import load_file
from tiny_models import SLOTS, hici_config, left_padded, prompt, randomise_slots, slots_of, tiny, worst
from torch.nn import functional as F

from hici_kernels import HiCIConfig
from hici_kernels.integrations import apply_hici, restore
from hici_kernels.nn import HiCIAttention
from hici_kernels.rope import Rope

TOLERANCE = 1e-5
KINDS = ("llama", "llama-mha", "qwen3", "qwen3-moe", "mistral", "qwen2")
SEGMENT = {"decode": "segment", "recurrence_len": 3}


def hici(family="llama", seed=7, **overrides):
    return randomise_slots(apply_hici(tiny(family), hici_config(**overrides)), seed)


def golden_models(directory):
    for path in sorted(directory.glob("manifest_*.json")):
        manifest = json.loads(path.read_text(encoding="utf-8"))
        yield from (c for c in manifest["cases"] if c["function"] == "model forward, labels")


def test_golden_two_layer_model(request):
    """Logits, loss and gradients of the authors' code, through transformers' own model."""
    directory = request.config.getoption("--golden-dir")
    entries = list(golden_models(directory))
    assert entries
    for entry in entries:
        t = load_file(directory / entry["file"])
        params = {k.removeprefix("param."): v for k, v in t.items() if k.startswith("param.")}
        vocab, hidden = params["model.embed_tokens.weight"].shape
        layers = 1 + max(int(k.split(".")[2]) for k in params if k.startswith("model.layers."))
        d, kv = entry["head_dim"], entry["kv_heads"]
        assert entry["reference"].startswith("qwen3")
        config = hf.Qwen3Config(
            vocab_size=vocab,
            hidden_size=hidden,
            intermediate_size=params["model.layers.0.mlp.gate_proj.weight"].shape[0],
            num_hidden_layers=layers,
            num_attention_heads=params["model.layers.0.self_attn.q_proj.weight"].shape[0] // d,
            num_key_value_heads=kv,
            head_dim=d,
            rms_norm_eps=1e-6,
            rope_parameters={"rope_type": "default", "rope_theta": entry["rope"]["theta"]},
        )
        own = {k.removeprefix("model.layers.0.self_attn."): v for k, v in params.items() if ".layers.0.self_attn." in k}
        slots = HiCIConfig(
            num_local_slots=own["local_constructor.memory_slots"].shape[0],
            global_slots=own["global_integrator.global_queries"].shape[0],
            num_heads=4,
            bottleneck_dim=own["local_constructor.q_proj.weight"].shape[0],
            shared_compress_dim=own["global_integrator.shared_compressor.0.weight"].shape[0],
            segment_len=int(entry["seq"] * entry["globals"]["group_size_ratio"]),
            context_mode=entry["globals"]["CAUSAL_CONTEXT_MODE"],
            empty="uniform",
            cut="index",
        )
        model = apply_hici(hf.Qwen3ForCausalLM(config), slots).train()
        model.load_state_dict(params, strict=True)
        ids, mask, labels = (t[f"in.{k}"] for k in ("input_ids", "attention_mask", "labels"))
        out = model(ids, attention_mask=mask, use_cache=False)
        assert worst(out.logits[mask.bool()], t["out.logits"][mask.bool()]) < TOLERANCE
        loss = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        assert worst(loss, t["out.loss"]) < TOLERANCE
        loss.backward()
        gradients = {k.removeprefix("grad.param."): v for k, v in t.items() if k.startswith("grad.param.")}
        assert gradients
        named = dict(model.named_parameters())
        for name, expected in gradients.items():
            assert worst(named[name].grad, expected) < 5e-5 * max(1.0, float(expected.abs().max())), name


@pytest.mark.parametrize("decode", ["segment", "full", "slots"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_layer_is_the_module(family, decode):
    """Prefill and decode of one attention layer against HiCIAttention with its weights, in a padded batch."""
    model = hici(family, decode=decode, recurrence_len=3)
    attention, hidden = model.model.layers[0].self_attn, torch.randn(2, 30, 64)
    eps = model.config.rms_norm_eps if family == "qwen3" else None
    config = HiCIConfig.from_dict(model.config.hici)
    assert config.cut == "token"
    rope = Rope(model.model.rotary_emb.inv_freq)
    layer = HiCIAttention(64, 4, 2, attention.head_dim, config, rope=rope, qk_norm_eps=eps)
    layer.load_state_dict(attention.state_dict())
    mask = torch.ones(2, 30, dtype=torch.bool)
    mask[0, :4] = False
    at = (mask.cumsum(1) - 1).clamp(min=0)
    theirs, ours = hf.DynamicCache(config=model.config), layer.new_cache(2)
    with torch.no_grad():
        for begin, end in ((0, 21), (21, 22), (22, 30)):
            cut = slice(begin, end)
            found, _ = attention(
                hidden[:, cut],
                position_embeddings=model.model.rotary_emb(hidden, at[:, cut]),
                position_ids=at[:, cut],
                attention_mask=mask[:, :end],
                past_key_values=theirs,
            )
            expected = layer(hidden[:, cut], positions=at[:, cut], attention_mask=mask[:, cut], cache=ours)
            assert worst(found[mask[:, cut]], expected[mask[:, cut]]) < TOLERANCE


@pytest.mark.parametrize("stored", [False, True])
def test_the_cut_in_force_is_recorded(stored):
    """That is "token" unless another was given, whether or not the configuration has been a dict in between."""
    for given, expected in (({}, "token"), ({"cut": "index"}, "index")):
        config = HiCIConfig(segment_len=8, num_heads=4, bottleneck_dim=16, shared_compress_dim=8, **given)
        config = HiCIConfig.from_dict(json.loads(json.dumps(config.to_dict()))) if stored else config
        assert apply_hici(tiny(), config).config.hici["cut"] == expected


@pytest.mark.parametrize("family", KINDS)
def test_generate_equals_the_uncached_model(family):
    """decode="segment" is one semantics: every generated token's logits are those of the whole text at once."""
    model, (ids, mask) = hici(family, **SEGMENT), left_padded(prompt())
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=20, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    whole = torch.cat((mask, mask.new_ones(2, 20)), 1)
    at = (whole.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        full = model(out.sequences, attention_mask=whole, position_ids=at, use_cache=False).logits
    assert worst(torch.stack(out.logits, 1), full[:, 39:-1]) < TOLERANCE
    plain = restore(model)
    with torch.no_grad():
        assert worst(plain(out.sequences, attention_mask=whole, position_ids=at).logits, full) > 1e-2


@pytest.mark.parametrize("decode", ["segment", "full", "slots"])
@pytest.mark.parametrize("strategy", ["sampling", "beams", "beam-sampling"])
def test_strategies_equal_recomputation(decode, strategy):
    """What beams leave in the cache is what the returned text would have put there (next token's logits)."""
    model, (ids, mask) = hici(decode=decode), left_padded(prompt())
    options = {
        "sampling": {"do_sample": True, "top_k": 0},
        "beams": {"num_beams": 3, "num_return_sequences": 3, "do_sample": False},
        "beam-sampling": {"num_beams": 2, "num_return_sequences": 2, "do_sample": True},
    }[strategy]
    torch.manual_seed(2)
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=12, return_dict_in_generate=True, output_scores=True, **options
    )
    rows = out.sequences.shape[0]
    repeat = rows // 2
    ids, mask = ids.repeat_interleave(repeat, 0), mask.repeat_interleave(repeat, 0)
    with torch.no_grad():
        step = model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
        score = torch.zeros(rows)
        for t in range(40, 52):
            chosen = out.sequences[:, t : t + 1]
            score += step.logits[:, -1].log_softmax(-1).gather(1, chosen)[:, 0]
            mask = torch.cat((mask, mask.new_ones(rows, 1)), 1)
            step = model(
                chosen,
                attention_mask=mask,
                position_ids=mask.sum(1, keepdim=True) - 1,
                past_key_values=step.past_key_values,
            )
    if strategy == "sampling":
        picked = torch.stack([s.log_softmax(-1) for s in out.scores], 1)
        expected = picked.gather(2, out.sequences[:, 40:, None])[..., 0].sum(1)
    else:
        expected = out.sequences_scores * 12  # length-normalised sums of log probabilities
    if strategy != "beam-sampling":
        assert worst(score, expected) < 1e-4


def test_chunked_prefill_and_conversations_need_one_semantics():
    model, ids = hici(**SEGMENT), prompt(1, 37)
    expected = model.generate(ids, max_new_tokens=16, do_sample=False)
    assert torch.equal(model.generate(ids, max_new_tokens=16, do_sample=False, prefill_chunk_size=5), expected)
    cache = hf.DynamicCache(config=model.config)
    first = model.generate(ids[:, :20], past_key_values=cache, max_new_tokens=1, do_sample=False)
    assert first.shape == (1, 21)
    text = torch.cat((first[:, :20], ids[:, 20:]), 1)
    cache.crop(-(cache.get_seq_length() - 20)) if cache.get_seq_length() > 20 else None
    assert torch.equal(model.generate(text, past_key_values=cache, max_new_tokens=16, do_sample=False), expected)


def test_the_cache_does_not_grow_with_segments():
    model = hici(**SEGMENT)
    sizes = []
    with torch.no_grad():
        for length in (40, 400):
            cache = model(prompt(1, length)).past_key_values
            sizes.append([layer.cache.nbytes for layer in cache.layers])
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("decode", ["full", "slots", "segment"])
def test_assisted_decoding_is_refused(decode):
    """Candidates come in one call with the prompt, so slots would have read what is then taken back."""
    model, ids = hici(decode=decode), torch.tensor([[5, 6, 7, 8, 9] * 6])
    with pytest.raises(ValueError, match=r"first call|length must be at least"):
        model.generate(ids, max_new_tokens=14, do_sample=False, prompt_lookup_num_tokens=4)


@pytest.mark.parametrize("decode", ["full", "slots"])
def test_crop_is_as_if_the_tokens_had_not_come(decode):
    model, (ids, mask) = hici(decode=decode), left_padded(prompt(2, 30))
    more, at = prompt(2, 6, 4), torch.arange(30, 36)[None]
    whole = torch.cat((mask, mask.new_ones(2, 6)), 1)
    with torch.no_grad():
        cache = model(ids, attention_mask=mask).past_key_values
        straight = model(more, attention_mask=whole, position_ids=at, past_key_values=copy.deepcopy(cache)).logits
        model(more.flip(1), attention_mask=whole, position_ids=at, past_key_values=cache)
        cache.crop(-6)
        again = model(more, attention_mask=whole, position_ids=at, past_key_values=cache).logits
    assert worst(straight, again) < TOLERANCE


def test_a_closed_segment_is_not_taken_back():
    model = hici(**SEGMENT)
    with torch.no_grad():
        cache = model(prompt(1, 20)).past_key_values
    cache.crop(-3)
    assert cache.get_seq_length() == 17
    with pytest.raises(ValueError, match="length must be at least 16"):
        cache.crop(-5)


def test_published_decode_rule_is_full_attention():
    """decode="full": after the prefill, every token attends to all cached tokens and to no slot."""
    model, ids = hici(decode="full", single_segment="off", segment_len=64), prompt(1, 30)
    plain = restore(copy.deepcopy(model))
    wanted = {"max_new_tokens": 12, "do_sample": False}
    assert torch.equal(model.generate(ids, **wanted), plain.generate(ids, **wanted))


@pytest.mark.parametrize("mode", ["causal_shift", "causal_shift_g"])
def test_no_token_sees_its_future(mode):
    model, ids = hici(context_mode=mode, recurrence_len=3), prompt(1, 40)
    other = ids.clone()
    other[0, 29] = (other[0, 29] + 1) % 97
    with torch.no_grad():
        a, b = (model(x, use_cache=False).logits for x in (ids, other))
    assert torch.equal(a[:, :29], b[:, :29])
    assert worst(a[:, 32:], b[:, 32:]) > 1e-4


def test_packed_documents():
    model = hici(**SEGMENT)
    docs = [prompt(1, n, n) for n in (13, 20, 7)]
    packed, at = torch.cat(docs, 1), torch.cat([torch.arange(d.shape[1]) for d in docs])[None]
    cu = torch.tensor([0, 13, 33, 40], dtype=torch.int32)
    with torch.no_grad():
        alone = torch.cat([model(d, use_cache=False).logits for d in docs], 1)
        by_offsets = model(packed, position_ids=at, cu_seq_lens_q=cu, cu_seq_lens_k=cu, use_cache=False).logits
        by_positions = model(packed, position_ids=at, use_cache=False).logits
    assert worst(by_offsets, alone) < TOLERANCE
    assert worst(by_positions, alone) < TOLERANCE
    with pytest.raises(ValueError, match="packed by position_ids"):
        model(packed.repeat(2, 1), position_ids=at.repeat(2, 1), use_cache=False)
    with pytest.raises(ValueError, match="segment_len"):
        ratio = hici(segment_len=None, num_segments=4)
        ratio(packed, position_ids=at, cu_seq_lens_q=cu, use_cache=False)


@pytest.mark.parametrize("family", KINDS)
def test_training(family):
    """Gradient checkpointing of either kind, and a cache made by default, change no gradient; all slots get one."""
    model, ids = hici(family, **SEGMENT).train(), prompt()

    def gradients(**kwargs):
        model.zero_grad()
        model(ids, labels=ids, **kwargs).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters()}

    plain, cached = gradients(use_cache=False), gradients()
    for reentrant in (True, False):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        saved = gradients(use_cache=False)
        assert all(torch.equal(plain[n], saved[n]) and torch.equal(plain[n], cached[n]) for n in plain)
    assert all(float(plain[n].abs().max()) > 0 for n in slots_of(model))
    model.gradient_checkpointing_disable()
    out = model(ids)
    with pytest.raises(ValueError, match="training step"):
        model(ids[:, :1], past_key_values=out.past_key_values)


def test_compile():
    model, ids = hici(**SEGMENT), prompt(2, 24)
    expected = model(ids, labels=ids, use_cache=False).loss
    model.zero_grad()
    expected.backward()
    wanted = {n: p.grad.clone() for n, p in slots_of(model).items()}
    model.zero_grad()
    torch._dynamo.reset()
    loss = torch.compile(model, fullgraph=True, backend="aot_eager")(ids, labels=ids, use_cache=False).loss
    assert worst(loss, expected) < TOLERANCE
    loss.backward()
    assert all(worst(p.grad, wanted[n]) < 1e-4 for n, p in slots_of(model).items())
    torch._dynamo.reset()
    step = torch.compile(model.forward, backend="aot_eager")
    with torch.no_grad():
        cache = model(ids[:, :20]).past_key_values
        parts = [step(input_ids=ids[:, t : t + 1], past_key_values=cache).logits for t in range(20, 24)]
        assert worst(torch.cat(parts, 1), model(ids, use_cache=False).logits[:, 20:]) < TOLERANCE
    torch._dynamo.reset()


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
def test_lora_on_the_slots_too(family):
    """Suffix matching puts adapters on the host's and on the slots' projections, as in the released checkpoints."""
    peft = pytest.importorskip("peft")
    model, ids = hici(family, **SEGMENT), prompt()
    lora = peft.LoraConfig(
        r=2, lora_alpha=4, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], init_lora_weights=False
    )
    torch.manual_seed(5)
    adapted = peft.get_peft_model(model, lora)
    names = [n for n, p in adapted.named_parameters() if "lora_" in n]
    assert len(names) == 2 * 24
    assert sum("local_constructor" in n or "global_integrator" in n for n in names) == 2 * 16
    adapted.train()
    adapted(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert all(float(p.grad.abs().max()) > 0 for n, p in adapted.named_parameters() if "lora_" in n)
    adapted.eval()
    with torch.no_grad():
        expected = adapted(input_ids=ids, use_cache=False).logits
        out = adapted.generate(input_ids=ids, max_new_tokens=10, do_sample=False, return_dict_in_generate=True,
                               output_logits=True)  # fmt: skip
        full = adapted(input_ids=out.sequences, use_cache=False).logits[:, 39:-1]
        assert worst(torch.stack(out.logits, 1), full) < TOLERANCE
        merged = adapted.merge_and_unload()
        assert worst(merged(ids, use_cache=False).logits, expected) < 1e-4


def test_modules_to_save(tmp_path):
    """PEFT's other way: the slot modules are copied, trained and saved whole."""
    peft = pytest.importorskip("peft")
    model, ids = hici(**SEGMENT), prompt()
    lora = peft.LoraConfig(r=2, target_modules=r".*self_attn\.[qv]_proj", modules_to_save=["local_constructor",
                           "global_integrator"])  # fmt: skip
    adapted = peft.get_peft_model(model, lora).train()
    adapted(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    with torch.no_grad():
        for p in adapted.parameters():
            if p.grad is not None:
                p.sub_(0.1 * p.grad)
    adapted.eval()
    expected = adapted(input_ids=ids, use_cache=False).logits
    adapted.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(hici(**SEGMENT), tmp_path).eval()
    assert worst(again(input_ids=ids, use_cache=False).logits, expected) < TOLERANCE
    out = again.generate(input_ids=ids, max_new_tokens=10, do_sample=False)
    assert out.shape == (2, 50)


@pytest.mark.parametrize("family", KINDS)
def test_save_pretrained_and_from_pretrained(family, tmp_path):
    model, ids = hici(family, **SEGMENT), prompt()
    expected = model(ids, use_cache=False).logits
    model.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert content["model_type"] == f"hici_{type(restore(copy.deepcopy(model)).config).model_type}"
    assert HiCIConfig.from_dict(content["hici"]) == HiCIConfig.from_dict(model.config.hici)
    again, info = hf.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert worst(again(ids, use_cache=False).logits, expected) < TOLERANCE
    assert len(again(ids, output_hidden_states=True).hidden_states) == 3
    assert torch.equal(
        again.generate(ids, max_new_tokens=5, do_sample=False), model.generate(ids, max_new_tokens=5, do_sample=False)
    )
    low = hf.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in low.parameters()} == {torch.bfloat16}
    plain = restore(again)
    assert type(plain.config) is type(restore(model).config)
    assert worst(plain(ids).logits, model(ids).logits) < TOLERANCE


def test_low_memory_loading(tmp_path):
    """device_map with a part on disk; nothing is materialised that the map leaves there."""
    pytest.importorskip("accelerate")
    model, ids = hici(**SEGMENT), prompt()
    expected = model(ids, use_cache=False).logits
    model.save_pretrained(tmp_path / "model")
    for places in ("auto", {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk",
                            "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}):  # fmt: skip
        again = hf.AutoModelForCausalLM.from_pretrained(
            tmp_path / "model", device_map=places, offload_folder=tmp_path / "off"
        )
        if places != "auto":
            assert all(p.device.type == "meta" for p in again.model.layers[1].parameters())
        with torch.no_grad():
            assert worst(again(ids, use_cache=False).logits, expected) < TOLERANCE
        out = again.generate(ids, max_new_tokens=10, do_sample=False)
        assert torch.equal(out, model.generate(ids, max_new_tokens=10, do_sample=False))


def test_missing_slots_are_an_error(tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    content |= {"model_type": "hici_llama", "hici": hici_config().to_dict()}
    (tmp_path / "config.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError, match="lacks 36 HiCI tensors"):
        hf.AutoModelForCausalLM.from_pretrained(tmp_path)


def test_restore_gives_back_the_model_bit_for_bit():
    model, ids = tiny("qwen3"), prompt()
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    config, logits = model.config.to_dict(), model(ids).logits
    randomise_slots(apply_hici(model, hici_config()))
    assert worst(model(ids).logits, logits) > 1e-2
    assert len(model.state_dict()) == len(weights) + 2 * 18
    restore(model)
    assert model.config.to_dict() == config and type(model.config) is hf.Qwen3Config
    assert list(model.state_dict()) == list(weights)
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert torch.equal(model(ids).logits, logits)
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_new_slots_start_as_published():
    model = apply_hici(tiny().to(torch.bfloat16), hici_config())
    assert {p.dtype for p in slots_of(model).values()} == {torch.bfloat16}
    integrator = model.model.layers[0].self_attn.global_integrator
    embedding = model.get_input_embeddings().weight
    rows = embedding[embedding.float().norm(dim=1).topk(SLOTS["global_slots"]).indices]
    expected = integrator.stat_expand(integrator.shared_compressor(rows))
    assert torch.equal(integrator.global_queries, expected)
    # nearly zero keys and values: a soft sink, so the model is close to itself in chunks
    assert float(integrator.expand_scale_param.detach()) == pytest.approx(-2.25, abs=0.01)


def test_refusals():
    model, ids = tiny(), prompt()
    with pytest.raises(TypeError, match="config must be a HiCIConfig"):
        apply_hici(model, {})
    apply_hici(model, hici_config())
    with pytest.raises(ValueError, match="already applied"):
        apply_hici(model, hici_config())
    with pytest.raises(ValueError, match="StaticLayer"):
        model.generate(ids, max_new_tokens=2, cache_implementation="static", disable_compile=True)
    with pytest.raises(ValueError, match="every layer"):
        apply_hici(tiny("gemma3"), hici_config())
    with pytest.raises(ValueError, match="k_proj and v_proj"):
        apply_hici(tiny("phi3"), hici_config())
    before = tiny()
    used = before(ids).past_key_values
    with pytest.raises(ValueError, match="not given to HiCI"):
        model(ids, past_key_values=used)
    with torch.no_grad():
        other = apply_hici(before, hici_config(recurrence_len=2))(ids).past_key_values
        with pytest.raises(ValueError, match="another HiCIConfig"):
            model(ids[:, :1], past_key_values=other)


@pytest.mark.parametrize("decode", ["segment", "full", "slots"])
def test_caches_under_autocast(decode):
    """float32 weights: transformers' rotation returns float32 keys beside bfloat16 values."""
    model = randomise_slots(apply_hici(tiny(), hici_config(decode=decode)))
    ids = prompt(2, 40)
    with torch.autocast("cpu", torch.bfloat16):
        model(ids, labels=ids).loss.backward()
        with torch.no_grad():
            assert worst(model(ids).logits, model(ids, use_cache=False).logits) < 0.1
            assert model.generate(ids, max_new_tokens=12, do_sample=False).shape == (2, 52)
    assert all(p.grad is not None for p in slots_of(model).values())


def test_packed_documents_and_a_cache_are_refused_together():
    model, ids = apply_hici(tiny(), hici_config()), prompt(1, 20)
    cu = torch.tensor([0, 8, 20], dtype=torch.int32)
    with pytest.raises(ValueError, match="cu_seq_lens_q"):
        model(ids, cu_seq_lens_q=cu)
    model(ids, cu_seq_lens_q=cu, use_cache=False)
    with pytest.raises(ValueError, match="hici_segment_len"):
        model(ids, hici_segment_len=0, use_cache=False)
