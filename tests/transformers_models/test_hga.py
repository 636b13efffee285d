"""apply_hga: with budgets that cover the text, the model's own numbers; with others, those of HGAAttention."""

from __future__ import annotations

import copy
import inspect

import pytest

pytest.importorskip("transformers")

import torch
import transformers as hf
from tiny_models import ALL, FAMILIES, FEW, hici_config, left_padded, prompt, randomise_slots, tiny, worst

from hici_kernels import HGAConfig, ImplError, KVStore, _native
from hici_kernels.integrations import (
    DCAConfig,
    HGACache,
    apply_dca,
    apply_hga,
    apply_hici,
    apply_rope_scaling,
    apply_shifted,
    restore,
)
from hici_kernels.integrations.masks import CROP_KEEPS
from hici_kernels.kv.options import check_options
from hici_kernels.nn import HGAAttention
from hici_kernels.rope import Rope

# of logits, float32; the models' logits are of order 1..10
TOLERANCE = 1e-5
STRATEGIES = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 20},
    "beams": {"num_beams": 3, "do_sample": False},
    "beam-sampling": {"num_beams": 2, "do_sample": True},
    "chunked-prefill": {"do_sample": False, "prefill_chunk_size": 7},
    "returned": {"do_sample": False, "num_return_sequences": 2, "num_beams": 2},
}
KINDS = ("llama", "mistral", "qwen2", "qwen3", "qwen3-moe", "gemma", "stablelm-partial", "llama-yarn")


def tier_options(tier, tmp_path):
    return {"path": str(tmp_path)} if tier == "disk" else {}


@pytest.fixture(params=("device", "host", "disk"))
def tier(request, tmp_path):
    """(name, options); a tier the store refuses is skipped, and only then."""
    options = tier_options(request.param, tmp_path)
    try:
        KVStore(
            ALL, rope=Rope.from_theta(1e4, 16), layers=1, kv_heads=1, head_dim=16, dtype=torch.float32, device="cpu",
            tier=request.param, **options,
        ).close()  # fmt: skip
    except ImplError as error:
        pytest.skip(str(error))
    return request.param, options


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_the_unmodified_model(family):
    """Prefill without a cache, prefill into one, decode, in a left-padded batch."""
    model, (ids, mask) = tiny(family), left_padded(prompt())
    real = mask.bool()
    with torch.no_grad():
        full = model(ids, attention_mask=mask, use_cache=False).logits
        apply_hga(model, ALL)
        assert worst(model(ids, attention_mask=mask, use_cache=False).logits[real], full[real]) < TOLERANCE
        out = model(ids[:, :25], attention_mask=mask[:, :25])
        assert worst(out.logits[real[:, :25]], full[:, :25][real[:, :25]]) < TOLERANCE
        for t in range(25, 40):
            out = model(ids[:, t : t + 1], attention_mask=mask[:, : t + 1], past_key_values=out.past_key_values)
            assert worst(out.logits, full[:, t : t + 1]) < TOLERANCE


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("family", KINDS)
def test_generate_equals_token_for_token(family, strategy):
    model, (ids, mask) = tiny(family), left_padded(prompt())
    wanted = {"attention_mask": mask, "max_new_tokens": 20, "return_dict_in_generate": True, "output_logits": True}

    def run():
        torch.manual_seed(3)
        return model.generate(ids, **wanted, **STRATEGIES[strategy])

    expected = run()
    apply_hga(model, ALL)
    found = run()
    assert torch.equal(found.sequences, expected.sequences)
    assert worst(found, expected) < TOLERANCE


@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen3-moe"])
def test_every_tier_gives_the_same(family, tier):
    name, options = tier
    model, (ids, mask) = tiny(family), left_padded(prompt())
    wanted = {"attention_mask": mask, "max_new_tokens": 20, "do_sample": False}
    expected = model.generate(ids, **wanted)
    apply_hga(model, ALL, store=name, **options)
    with HGACache(model) as cache:
        assert torch.equal(model.generate(ids, past_key_values=cache, **wanted), expected)
        assert cache.store.tier == name
        assert sum(cache.stats()["resident_bytes"].values()) > 0
    restore(model)
    apply_hga(model, FEW)
    routed = model.generate(ids, **wanted)
    restore(model)
    apply_hga(model, FEW, store=name, **options)
    assert torch.equal(model.generate(ids, **wanted), routed)


def test_store_limits_reach_the_store():
    model = apply_hga(tiny(), ALL, device_bytes=1000)
    with pytest.raises(ValueError, match="device_bytes is 1000"):
        model.generate(prompt(), max_new_tokens=1)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_routed_attention_is_that_of_the_module(family):
    """Budgets that leave most out: the same numbers as HGAAttention with this layer's weights, far from the model's."""
    model, hidden = tiny(family), torch.randn(2, 60, 64)
    at = torch.arange(60)[None]
    attention = model.model.layers[0].self_attn
    embeddings = model.model.rotary_emb(hidden, at)
    plain = attention(hidden, position_embeddings=embeddings, position_ids=at, attention_mask=None)[0]
    apply_hga(model, FEW)
    found = attention(hidden, position_embeddings=embeddings, position_ids=at, attention_mask=None)[0]
    eps = model.config.rms_norm_eps if family == "qwen3" else None
    layer = HGAAttention(64, 4, 2, attention.head_dim, FEW, rope=Rope(model.model.rotary_emb.inv_freq), qk_norm_eps=eps)
    layer.load_state_dict(attention.state_dict())
    assert worst(found, layer(hidden)) < TOLERANCE
    assert worst(found, plain) > 1e-2


@pytest.mark.parametrize("family", KINDS)
def test_routing_does_not_depend_on_the_split(family):
    """Strict routing: prefill at once, in pieces, and token by token."""
    model, (ids, mask) = apply_hga(tiny(family), FEW), left_padded(prompt(2, 60))
    with torch.no_grad():
        full = model(ids, attention_mask=mask).logits
        cache, parts = HGACache(model), []
        for begin, end in ((0, 13), (13, 40), (40, 41), (41, 60)):
            out = model(ids[:, begin:end], attention_mask=mask[:, :end], past_key_values=cache)
            parts.append(out.logits)
    assert worst(torch.cat(parts, 1)[mask.bool()], full[mask.bool()]) < TOLERANCE


def test_rows_of_a_padded_batch_equal_the_rows_alone():
    model, (ids, mask) = apply_hga(tiny(), FEW), left_padded(prompt(2, 60), 9)
    with torch.no_grad():
        at = (mask.cumsum(1) - 1).clamp(min=0)
        both = model(ids, attention_mask=mask, position_ids=at).logits
        alone = model(ids[:1, 9:]).logits
    assert worst(both[:1, 9:], alone) < TOLERANCE


@pytest.mark.parametrize("family", KINDS)
def test_continued_conversation(family):
    model, ids = tiny(family), prompt(1, 30)
    turns = [prompt(1, 7, seed) for seed in (5, 6)]

    def talk(cache):
        text = ids
        for turn in turns:
            text = model.generate(text, past_key_values=cache, max_new_tokens=6, do_sample=False)
            text = torch.cat((text, turn), 1)
        return model.generate(text, past_key_values=cache, max_new_tokens=6, do_sample=False)

    expected = talk(hf.DynamicCache(config=model.config))
    apply_hga(model, ALL)
    cache = HGACache(model)
    assert torch.equal(talk(cache), expected)
    assert int(cache.store.lengths[0]) == cache.get_seq_length() == expected.shape[1] - 1
    assert torch.equal(talk(hf.DynamicCache(config=model.config)), expected)
    assert torch.equal(talk(hf.DynamicCache()), expected)


@pytest.mark.parametrize("family", KINDS)
@pytest.mark.parametrize("padding", [0, 5])
def test_crop_is_as_if_the_tokens_had_not_come(padding, family):
    model, ids = apply_hga(tiny(family), FEW), prompt(2, 50)
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    mask[1, 40:43] = 0  # padding that is cropped away must not be counted as tokens
    with torch.no_grad():
        whole = torch.cat((mask[:, :37], torch.ones_like(mask[:, :9])), 1)
        other, cache = HGACache(model), HGACache(model)
        for made in (other, cache):
            model(ids[:, :37], attention_mask=mask[:, :37], past_key_values=made)
        straight = model(prompt(2, 9, 3), attention_mask=whole, past_key_values=other).logits
        model(ids[:, 37:], attention_mask=mask, past_key_values=cache)
        cache.crop(-13)
        assert cache.get_seq_length() == 37
        assert cache.store.lengths.tolist() == [37 - padding, 37]
        again = model(prompt(2, 9, 3), attention_mask=whole, past_key_values=cache).logits
    assert torch.equal(straight, again)
    if CROP_KEEPS:
        cache.crop(40)
        assert cache.get_seq_length() == 40
    else:
        with pytest.raises(ValueError, match="must be negative"):
            cache.crop(5)


@pytest.mark.parametrize("family", KINDS)
def test_assisted_and_prompt_lookup_decoding(family):
    """Candidates are taken back by crop()."""
    model, helper = tiny(family), tiny(seed=9)
    ids = torch.tensor([[5, 6, 7, 8, 9] * 6])
    wanted = {"max_new_tokens": 16, "do_sample": False}
    expected = model.generate(ids, **wanted)
    apply_hga(model, ALL)
    assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=4, **wanted), expected)
    assert torch.equal(model.generate(ids, assistant_model=helper, **wanted), expected)
    apply_hga(helper, ALL)
    assert torch.equal(model.generate(ids, assistant_model=helper, **wanted), expected)


def test_cache_reset_select_and_repeat():
    model, ids = apply_hga(tiny(), FEW), prompt(2, 30)
    with torch.no_grad():
        cache = HGACache(model)
        assert cache.stats() == {} and cache.store is None
        first = model(ids, past_key_values=cache).logits
        cache.batch_repeat_interleave(2)
        assert cache.store.batch == 4
        cache.batch_select_indices(torch.tensor([3]))
        step = model(ids[:1, :1], past_key_values=cache).logits
        alone = model(torch.cat((ids[1:], ids[:1, :1]), 1)).logits[:, -1:]
        assert worst(step, alone) < TOLERANCE
        cache.reset()
        assert cache.get_seq_length() == 0
        assert torch.equal(model(ids, past_key_values=cache).logits, first)


def test_restore_gives_back_the_model_bit_for_bit():
    model, ids = tiny("qwen3"), prompt()
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    config, logits = model.config.to_dict(), model(ids).logits
    assert restore(model) is model
    apply_hga(model, FEW)
    assert worst(model(ids).logits, logits) > 1e-3
    assert model.config.hga == FEW.to_dict()
    assert list(model.state_dict()) == list(weights)
    restore(model)
    assert model.config.to_dict() == config and model.config._attn_implementation == "sdpa"
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert torch.equal(model(ids).logits, logits)
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_a_copy_is_independent():
    model, ids = tiny(), prompt()
    plain = model(ids).logits
    apply_hga(model, FEW)
    routed, other = model(ids).logits, copy.deepcopy(model)
    restore(other)
    assert torch.equal(other(ids).logits, plain)
    assert torch.equal(model(ids).logits, routed)


def test_a_copied_cache_is_independent(tier):
    """copy.deepcopy(cache), as prompts shared by several answers use it: both go on from the same history."""
    name, options = tier
    model, ids, more = apply_hga(tiny(), FEW, store=name, **options), prompt(), prompt(2, 5, 4)
    with torch.no_grad():
        cache = HGACache(model)
        model(ids, past_key_values=cache)
        other = copy.deepcopy(cache)
        assert other.store.tier == name
        first = model(more, past_key_values=cache).logits
        assert other.get_seq_length() == 40 and cache.get_seq_length() == 45
        assert torch.equal(model(more, past_key_values=other).logits, first)


def test_a_cache_of_8_bit_pages_can_be_copied():
    model, ids = apply_hga(tiny(), FEW, store="host", cold_dtype=torch.int8), prompt()
    with torch.no_grad():
        cache = HGACache(model)
        model(ids, past_key_values=cache)
        other = copy.deepcopy(cache)
        assert other.store.cold_dtype == torch.int8
        assert torch.equal(model(ids, past_key_values=other).logits, model(ids, past_key_values=cache).logits)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: apply_hga(m, FEW),
        lambda m: randomise_slots(apply_hici(m, hici_config())),
        lambda m: apply_shifted(m, 8).train(),
        lambda m: apply_dca(m, DCAConfig(chunk_len=8, local_len=4)),
        lambda m: apply_rope_scaling(m, "linear", 2.0),
    ],
    ids=["hga", "hici", "shifted", "dca", "rope"],
)
def test_a_model_of_the_same_config_object_stays_as_it_is(change):
    model, ids = tiny(), prompt()
    other = type(model)(model.config).eval()
    other.load_state_dict(model.state_dict())
    plain, config = other(ids).logits, copy.deepcopy(other.config.to_dict())
    change(model)
    assert torch.equal(other(ids).logits, plain) and other.config.to_dict() == config
    assert all(m.config is model.config for m in model.modules() if "config" in vars(m))
    assert not torch.equal(model(ids).logits, plain)
    restore(model)
    assert torch.equal(model.eval()(ids).logits, plain) and model.config.to_dict() == config


@pytest.mark.parametrize("family", KINDS)
def test_save_and_load(family, tmp_path):
    model, ids = apply_hga(tiny(family), FEW), prompt()
    model.save_pretrained(tmp_path)
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again.config) is FAMILIES[family][0] and again.config._attn_implementation == "sdpa"
    apply_hga(again, HGAConfig.from_dict(again.config.hga))
    assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize("family", KINDS)
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_and_training_with_a_cache(reentrant, family):
    model, ids = apply_hga(tiny(family), FEW).train(), prompt()

    def gradients(**kwargs):
        model.zero_grad()
        model(ids, labels=ids, **kwargs).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters()}

    plain, cached = gradients(use_cache=False), gradients(use_cache=True)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    saved = gradients(use_cache=False)
    assert all(torch.equal(plain[n], saved[n]) and torch.equal(plain[n], cached[n]) for n in plain)
    assert all(float(g.abs().max()) > 0 for n, g in plain.items() if "self_attn" in n)


def test_a_cache_of_a_training_step_is_refused_later():
    model, ids = apply_hga(tiny(), FEW).train(), prompt()
    model.gradient_checkpointing_disable()
    cache = model(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="comes from a training step"):
        model(ids[:, :1], past_key_values=cache)


def test_compile():
    model, ids = apply_hga(tiny(), FEW), prompt(2, 24)
    expected = model(ids, labels=ids, use_cache=False).loss
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert worst(compiled(ids, labels=ids, use_cache=False).loss, expected) < TOLERANCE
    torch._dynamo.reset()
    step = torch.compile(model.forward, backend="aot_eager")
    with torch.no_grad():
        cache = HGACache(model)
        first = model(ids[:, :20], past_key_values=cache).logits
        parts = [first] + [step(input_ids=ids[:, t : t + 1], past_key_values=cache).logits for t in range(20, 24)]
        assert worst(torch.cat(parts, 1), model(ids).logits) < TOLERANCE
    torch._dynamo.reset()


@pytest.mark.parametrize("order", ["adapter-first", "adapter-last"])
def test_lora(order, tmp_path):
    peft = pytest.importorskip("peft")
    model, ids = tiny(), prompt()
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    torch.manual_seed(4)
    if order == "adapter-first":
        adapted = peft.get_peft_model(model, lora)
        expected = adapted.generate(input_ids=ids, max_new_tokens=8, do_sample=False)
        apply_hga(adapted, ALL)
    else:
        apply_hga(model, ALL)
        adapted = peft.get_peft_model(model, lora)
        expected = None
    found = adapted.generate(input_ids=ids, max_new_tokens=8, do_sample=False)
    restore(adapted)
    expected = adapted.generate(input_ids=ids, max_new_tokens=8, do_sample=False) if expected is None else expected
    assert torch.equal(found, expected)
    apply_hga(adapted, FEW)
    adapted.train()
    adapted(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for n, p in adapted.named_parameters() if "lora_" in n)


def test_autocast_and_low_precision():
    model, ids = apply_hga(tiny(), ALL), prompt()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out = model(ids[:, :30])
        step = model(ids[:, 30:], past_key_values=out.past_key_values).logits
        full = restore(model)(ids).logits
    assert worst(step, full[:, 30:]) < 0.2 * float(full.abs().max())
    apply_hga(model.to(torch.bfloat16), ALL)
    cache = HGACache(model)
    assert model.generate(ids, max_new_tokens=4, past_key_values=cache).shape == (2, 44)
    assert cache.store.dtype == torch.bfloat16


def test_device_map_and_offload(tmp_path):
    pytest.importorskip("accelerate")
    tiny().save_pretrained(tmp_path / "model")
    ids = prompt()
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu",
              "model.rotary_emb": "cpu", "lm_head": "cpu"}  # fmt: skip
    model = hf.AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "off"
    )
    expected = model.generate(ids, max_new_tokens=6, do_sample=False)
    apply_hga(model, ALL)
    assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), expected)


def test_refusals():
    model = tiny()
    with pytest.raises(TypeError, match="config must be"):
        apply_hga(model, object())
    with pytest.raises(ValueError, match="store must be"):
        apply_hga(model, ALL, store="tape")
    with pytest.raises(TypeError, match="transformers model"):
        apply_hga(torch.nn.Linear(2, 2), ALL)
    apply_hga(model, ALL)
    with pytest.raises(ValueError, match="apply_hga is already applied"):
        apply_hga(model, ALL)
    ids = prompt()
    with pytest.raises(ValueError, match="StaticLayer"):
        model.generate(ids, max_new_tokens=2, cache_implementation="static", disable_compile=True)
    with pytest.raises(ValueError, match="packed by position_ids"):
        model(ids[:1], position_ids=torch.cat((torch.arange(10), torch.arange(30)))[None], use_cache=False)
    with pytest.raises(ValueError, match="mask of shape"):
        model(ids, attention_mask=torch.ones(2, 1, 40, 40, dtype=torch.bool), use_cache=False)
    used = restore(model)(ids).past_key_values
    apply_hga(model, ALL)
    with pytest.raises(ValueError, match="not given to HGA"):
        model(ids, past_key_values=used)
    cache = HGACache(model)
    restore(model)
    apply_hga(model, ALL)
    with pytest.raises(ValueError, match="made for another model"):
        model(ids, past_key_values=cache)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"foo": 1}, "'foo' is not an option of KVStore"),
        ({"tier": "host"}, "tier is the argument store here"),
        ({"batch": 2}, "batch is the model's"),
        ({"layers": 7}, "layers is the model's"),
        ({"dtype": torch.float32}, "dtype is the model's"),
        ({"device": "cpu"}, "device is the model's"),
        ({"store": "disk"}, "path must be given with tier='disk'"),
        ({"store": "disk", "path": "{}/absent"}, "path must be a directory that exists"),
        ({"store": "disk", "path": 3}, "path must be a str or a path"),
        ({"path": "{}"}, "path must be None with tier='device'"),
        ({"store": "host", "path": "{}"}, "path must be None with tier='host'"),
        ({"device_bytes": -1}, "device_bytes must be at least 0"),
        ({"device_bytes": 2e9}, "device_bytes must be an int"),
        ({"host_bytes": 10}, "host_bytes must be None with tier='device'"),
        ({"store": "disk", "path": "{}", "host_bytes": 10}, "host_bytes must hold at least one page"),
        ({"bank_pages": 1}, "bank_pages must be None with tier='device'"),
        ({"cold_dtype": torch.float16}, "cold_dtype must be None or torch.int8"),
        ({"fetch": "gather"}, "fetch must be 'copy' with tier='device'"),
        ({"store": "host", "fetch": "push"}, "fetch must be one of"),
        ({"queue_depth": 0}, "queue_depth must be at least 1"),
        ({"io": "mmap"}, "io must be one of"),
        ({"direct": 1}, "direct must be a bool"),
        ({"prefetch": "yes"}, "prefetch must be a bool"),
    ],
    ids=str,
)
def test_store_options_are_refused_before_the_model_changes(options, message, tmp_path, monkeypatch):
    """By the rules of KVStore itself, and without a store or a file."""
    monkeypatch.setattr(_native, "status", lambda: None)
    options = {k: v.format(tmp_path) if isinstance(v, str) else v for k, v in options.items()}
    model = tiny()
    before, implementation = dict(vars(model.config)), model.config._attn_implementation
    with pytest.raises((TypeError, ValueError), match=message):
        apply_hga(model, ALL, **options)
    assert dict(vars(model.config)) == before and model.config._attn_implementation == implementation
    assert not any(m._forward_pre_hooks for m in model.modules()) and not list(tmp_path.iterdir())
    apply_hga(model, ALL)


def test_the_disk_without_the_native_library_is_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(_native, "status", lambda: "not built")
    with pytest.raises(ImplError, match="tier='disk' needs the native library: not built"):
        apply_hga(tiny(), ALL, store="disk", path=tmp_path)


def test_every_store_option_is_the_stores_own():
    """What apply_hga passes on and what it names as the model's are together what KVStore takes."""
    options = set(inspect.signature(check_options).parameters)
    given = {"config", "rope", "layers", "kv_heads", "head_dim", "batch", "dtype", "device"}
    assert options | given == set(inspect.signature(KVStore).parameters) and not options & given


@pytest.mark.parametrize(
    "config, message",
    [
        (lambda s: hf.LlamaConfig(**s, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
         "changes its frequencies"),
        (lambda s: hf.MistralConfig(**s, sliding_window=8), "sliding window"),
        (lambda s: hf.Gemma2Config(**s, head_dim=16), "soft cap"),
        (lambda s: hf.CohereConfig(**s), "another layout"),
        (lambda s: hf.GlmConfig(**s, head_dim=16), "another layout"),
        (lambda s: hf.GptOssConfig(**s, head_dim=16, num_local_experts=2), "attention sinks"),
    ],
    ids=["dynamic", "sliding", "soft-cap", "interleaved", "interleaved-partial", "sinks"],
)  # fmt: skip
def test_models_that_cannot_be_served_are_refused_whole(config, message):
    from tiny_models import SIZES

    model = hf.AutoModelForCausalLM.from_config(config(SIZES))
    before = model.config._attn_implementation
    with pytest.raises(ValueError, match=message):
        apply_hga(model, ALL)
    assert model.config._attn_implementation == before and not hasattr(model.config, "hga")
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_dropout_is_refused():
    model = apply_hga(tiny(attention_dropout=0.1), ALL).train()
    with pytest.raises(ValueError, match="dropout"):
        model(prompt(), use_cache=False)


@pytest.mark.parametrize("cache", [True, False])
def test_packed_documents_are_refused(cache):
    with pytest.raises(ValueError, match="cu_seq_lens_q"):
        apply_hga(tiny(), FEW)(prompt(1, 20), cu_seq_lens_q=torch.tensor([0, 8, 20]), use_cache=cache)


def test_restore_gives_back_what_the_config_said(tmp_path):
    apply_hga(tiny(), FEW).save_pretrained(tmp_path)
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path)
    restore(apply_hga(again, HGAConfig()))
    assert again.config.hga == FEW.to_dict()


@pytest.mark.parametrize(
    "change", [lambda m: apply_dca(m, DCAConfig(chunk_len=16, local_len=4)), lambda m: apply_shifted(m, 8)]
)
def test_baselines_refuse_caches_that_do_not_grow(change):
    model, ids = change(tiny()), prompt()
    with pytest.raises(ValueError, match="cache that grows"):
        model.generate(ids, max_new_tokens=3, do_sample=False, cache_implementation="static")
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape[1] == ids.shape[1] + 3
