"""Published checkpoint layouts: written here by the authors' rules, loaded, merged, extracted, converted."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest

pytest.importorskip("transformers")

import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from test_chat_and_cli import save_tokenizer
from tiny_models import hici_config, prompt, randomise_slots, slots_of, tiny, worst
from torch import Tensor
from trained_models import LORA, SAID, TOLERANCE, logits, trained

from hici_kernels import HiCIConfig
from hici_kernels.checkpoints import convert, extract
from hici_kernels.integrations import apply_hici, load_hici, merge_hici, restore, save_hici


def published(adapted, adapter_dtype=torch.bfloat16) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The two files as the authors' scripts write them (names of peft 0.5: no base_layer)."""
    adapter, trainable = {}, {}
    for name, x in adapted.state_dict().items():
        if "lora" in name:
            adapter[name.replace("default.", "")] = x.to(adapter_dtype)
        elif any(part in name for part in ("embed", "norm", "local_constructor", "global_integrator")):
            trainable[name[17:].replace(".base_layer.", ".")] = x.float().clone()
    return adapter, trainable


def old_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        k.replace("local_constructor", "global_memory").replace("global_integrator", "hierarchical_aggregator"): v
        for k, v in tensors.items()
    }


def write(directory: Path, adapter, trainable, suffix="safetensors", alpha: int | None = 4) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    for stem, tensors in (("adapter_model", adapter), ("trainable_params", trainable)):
        if suffix == "bin":
            torch.save(tensors, directory / f"{stem}.bin")
        else:
            save_file({k: v.contiguous() for k, v in tensors.items()}, directory / f"{stem}.safetensors")
    if alpha is not None:
        (directory / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": alpha}), encoding="utf-8")
    return directory


def rounded(adapted):
    """The trained model with its LoRA matrices as bfloat16 would store them."""
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "lora_" in name:
                p.copy_(p.bfloat16())
    return adapted.eval()


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("naming", ["new", "old", "peft-0.6"])
def test_published_layout_round_trip(family, suffix, naming, tmp_path):
    adapted = rounded(trained(family, rows=98))
    adapter, trainable = published(adapted)
    if naming == "old":
        adapter, trainable = old_names(adapter), old_names(trainable)
    if naming == "peft-0.6":
        trainable = {
            k.replace("_proj.weight", "_proj.base_layer.weight") if "_proj.weight" in k else k: v
            for k, v in trainable.items()
        }
    write(tmp_path, adapter, trainable, suffix)
    loaded = load_hici(tiny(family), tmp_path, **SAID)
    assert worst(logits(loaded), logits(adapted)) < TOLERANCE
    assert loaded.get_input_embeddings().weight.shape[0] == 98
    merged = load_hici(tiny(family), tmp_path, merge_lora=True, **SAID)
    assert not any("lora_" in n for n, _ in merged.named_parameters())
    assert worst(logits(merged), logits(adapted)) < 1e-4


def test_counts_and_names_of_a_7b_shape(tmp_path):
    """32 layers with tiny widths: 642 and 768 tensors, of float32 and bfloat16, under the published names."""
    adapted = trained(rows=98, num_hidden_layers=32)
    adapter, trainable = published(adapted)
    assert (len(trainable), len(adapter)) == (642, 768)
    assert {x.dtype for x in trainable.values()} == {torch.float32}
    assert {x.dtype for x in adapter.values()} == {torch.bfloat16}
    last = "model.layers.31.self_attn."
    assert f"{last}local_constructor.memory_slots" in trainable
    assert trainable[f"{last}global_integrator.expand_scale_param"].shape == ()
    assert f"base_model.model.{last}global_integrator.o_proj.lora_B.weight" in adapter
    write(tmp_path, adapter, trainable, "bin")
    loaded = load_hici(tiny(num_hidden_layers=32), tmp_path, **SAID)
    assert worst(logits(loaded), logits(rounded(adapted))) < 1e-4
    save_hici(loaded, tmp_path / "again")
    assert len(load_file(tmp_path / "again" / "trainable_params.safetensors")) == 642
    assert len(load_file(tmp_path / "again" / "adapter_model.safetensors")) == 768


def test_qwen3_counts():
    adapter, trainable = published(trained("qwen3", num_hidden_layers=36))
    assert (len(trainable), len(adapter)) == (794, 864)


def test_first_published_version(tmp_path):
    """Slots named local_queries, an integrator without output projection, no LoRA."""
    model = randomise_slots(apply_hici(tiny(), hici_config()))
    width = model.model.layers[0].self_attn.global_integrator.o_proj.weight
    for layer in model.model.layers:
        with torch.no_grad():
            layer.self_attn.global_integrator.o_proj.weight.copy_(torch.eye(width.shape[0]))
    tensors = {
        k.replace("local_constructor.memory_slots", "local_constructor.local_queries"): v.detach().clone()
        for k, v in model.named_parameters()
        if any(part in k for part in ("embed", "norm", "local_constructor", "global_integrator"))
        and "global_integrator.o_proj" not in k
    }
    save_file(tensors, tmp_path / "trainable_params.safetensors")
    assert worst(logits(load_hici(tiny(), tmp_path, **SAID)), logits(model)) < TOLERANCE
    by_file = load_hici(tiny(), tmp_path / "trainable_params.safetensors", **SAID)
    assert worst(logits(by_file), logits(model)) < TOLERANCE


def test_sizes_are_read_from_the_tensors(tmp_path):
    """No bottleneck and five compressors; and the card's num_memory_slots."""
    config = hici_config(bottleneck_dim=None, compress_dim=12, shared_compress_dim=None, num_local_slots=3)
    model = randomise_slots(apply_hici(tiny(), config))
    save_file({k: v.detach().clone() for k, v in slots_of(model).items()}, tmp_path / "trainable_params.safetensors")
    loaded = load_hici(tiny(), tmp_path, num_memory_slots=3, **SAID)
    assert HiCIConfig.from_dict(loaded.config.hici) == HiCIConfig.from_dict(model.config.hici)
    assert worst(logits(loaded), logits(model)) < TOLERANCE
    with pytest.raises(ValueError, match=r"num_local_slots is 4, but the tensors of .* have 3"):
        load_hici(tiny(), tmp_path, num_memory_slots=4, **SAID)


@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_what_shapes_cannot_tell_is_asked_for(factor, tmp_path):
    adapter, trainable = published(trained())
    write(tmp_path, adapter, trainable, alpha=None)
    model = tiny()
    before = logits(model)
    with pytest.raises(ValueError) as error:
        load_hici(model, tmp_path)
    for name in ("num_heads", "context_mode", "segment_len or num_segments", "rope_factor", "lora_alpha"):
        assert name in str(error.value)
    for name in ("num_heads", "context_mode", "segment_len", "rope_factor"):
        with pytest.raises(ValueError, match=name):
            load_hici(model, tmp_path, lora_alpha=4, **{k: v for k, v in SAID.items() if k != name})
    assert torch.equal(logits(model), before) and model.config._attn_implementation == "sdpa"
    said = {**SAID, "rope_factor": factor, "lora_alpha": 4}
    loaded = load_hici(model, tmp_path, **said)
    rope = loaded.config.rope_parameters
    assert rope["rope_type"] == ("default" if factor == 1 else "linear")
    assert factor == 1 or rope["factor"] == factor
    plain = restore(load_hici(tiny(), tmp_path, merge_lora=True, **said))
    assert plain.config.rope_parameters["rope_type"] == "default"


def test_rope_factor_is_position_interpolation(tmp_path):
    adapter, trainable = published(rounded(trained()))
    write(tmp_path, adapter, trainable)
    loaded = load_hici(tiny(), tmp_path, **{**SAID, "rope_factor": 2.0})
    stretched = load_hici(tiny(), tmp_path, **SAID)
    # a mask: transformers would take positions with gaps for packed documents
    at, mask = torch.arange(40)[None], torch.ones(2, 40)
    assert worst(logits(loaded, position_ids=2 * at, attention_mask=mask), logits(stretched)) < TOLERANCE
    already = tiny(rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0})
    assert worst(logits(load_hici(already, tmp_path, **{**SAID, "rope_factor": 2.0})), logits(loaded)) < TOLERANCE
    with pytest.raises(ValueError, match=r"RoPE factor 3.0, the checkpoint needs rope_factor 2.0"):
        other = tiny(rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0})
        load_hici(other, tmp_path, **{**SAID, "rope_factor": 2.0})


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_save_and_load(family, tmp_path):
    """What save_hici writes needs nothing said."""
    adapted = trained(family, rows=98).eval()
    save_hici(adapted, tmp_path)
    loaded = load_hici(tiny(family), tmp_path)
    assert worst(logits(loaded), logits(adapted)) < TOLERANCE
    assert HiCIConfig.from_dict(loaded.config.hici) == HiCIConfig.from_dict(adapted.config.hici)
    changed = load_hici(tiny(family), tmp_path, segment_len=16, decode="full")
    assert changed.config.hici["segment_len"] == 16
    alone = randomise_slots(apply_hici(tiny(family), hici_config()))
    save_hici(alone, tmp_path / "alone")
    assert not (tmp_path / "alone" / "adapter_model.safetensors").exists()
    assert worst(logits(load_hici(tiny(family), tmp_path / "alone")), logits(alone)) < TOLERANCE


def test_biases_that_an_adapter_trains_are_saved(tmp_path):
    """And what else is named; both come back from the same file."""
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(**LORA, init_lora_weights=False, bias="lora_only")
    adapted = peft.get_peft_model(randomise_slots(apply_hici(tiny(attention_bias=True), hici_config())), lora)
    changed = "model.layers.1.mlp.up_proj.weight"
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if name.endswith((".bias", changed)):
                p.add_(torch.randn_like(p))
    save_hici(adapted, tmp_path, also=[changed])
    assert worst(logits(load_hici(tiny(attention_bias=True), tmp_path)), logits(adapted.eval())) < TOLERANCE
    with pytest.raises(ValueError, match=r"also names 'model\.norm\.bias'"):
        save_hici(adapted, tmp_path / "out", also=["model.norm.bias"])
    assert not (tmp_path / "out").exists()


def test_lora_on_a_tied_head(tmp_path):
    """Beside the shared matrix it is the head's alone; added to it, it would be the embedding's too."""
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    adapted = randomise_slots(apply_hici(tiny(tie_word_embeddings=True), hici_config()))
    adapted = peft.get_peft_model(adapted, lora).eval()
    save_hici(adapted, tmp_path)
    loaded = load_hici(tiny(tie_word_embeddings=True), tmp_path)
    assert worst(logits(loaded), logits(adapted)) < TOLERANCE
    assert worst(logits(loaded), logits(load_without_head(tmp_path))) > 1e-3
    with pytest.raises(ValueError, match="LoRA for lm_head, whose weight the model ties"):
        load_hici(tiny(tie_word_embeddings=True), tmp_path, merge_lora=True)
    with pytest.raises(ValueError, match=r"lm_head has LoRA and a weight tied"):
        merge_hici(adapted, tmp_path / "merged", keep_slots=True)


def load_without_head(path):
    loaded = load_hici(tiny(tie_word_embeddings=True), path)
    with torch.no_grad():
        for name, p in loaded.named_parameters():
            if "lm_head.lora_B" in name:
                p.zero_()
    return loaded


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_merge_keeping_slots(family, tmp_path):
    adapted = trained(family, rows=98).eval()
    before = {k: v.clone() for k, v in adapted.state_dict().items()}
    merge_hici(adapted, tmp_path, keep_slots=True)
    assert all(torch.equal(v, before[k]) for k, v in adapted.state_dict().items())
    expected = logits(adapted)
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert worst(logits(again), expected) < 1e-4
    assert worst(logits(load_hici(tmp_path, tmp_path)), expected) < 1e-4
    assert worst(logits(load_hici(tiny(family), tmp_path)), expected) < 1e-4


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_merge_dropping_slots(family, tmp_path):
    """A standard model: what the trained one is once its slots are gone."""
    adapted = trained(family, rows=98).eval()
    merge_hici(adapted, tmp_path, keep_slots=False)
    content = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert content["model_type"] == family and "hici" not in content
    assert content["architectures"] == [{"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}[family]]
    assert not any("local_constructor" in k for k in load_file(tmp_path / "model.safetensors"))
    plain, info = hf.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert type(plain).__module__.startswith("transformers.")
    restore(adapted)
    assert worst(logits(plain), logits(adapted)) < 1e-4
    with pytest.raises(TypeError, match="keep_slots"):
        merge_hici(adapted, tmp_path, "yes")


@pytest.mark.parametrize("kind", ["use_dora", "lora_bias"])
def test_adapters_that_are_more_than_a_product_are_not_merged(kind, tmp_path):
    peft = pytest.importorskip("peft")
    model = apply_hici(tiny("llama"), hici_config())
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], **{kind: True})
    with pytest.raises(ValueError, match=kind):
        merge_hici(peft.get_peft_model(model, lora), tmp_path, keep_slots=True)
    assert not list(tmp_path.iterdir())


def test_published_merged_directory(tmp_path):
    """A plain model type with slot modules among its weights, as .bin shards; its config says nothing of them."""
    model = randomise_slots(apply_hici(tiny(), hici_config()))
    expected = logits(model)
    tensors = {k: v.clone() for k, v in model.state_dict().items()}
    parts = [dict(list(tensors.items())[i::2]) for i in (0, 1)]
    files = [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
    for part, file in zip(parts, files, strict=True):
        torch.save(part, tmp_path / file)
    index = {name: file for part, file in zip(parts, files, strict=True) for name in part}
    (tmp_path / "pytorch_model.bin.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": index}), encoding="utf-8"
    )
    restore(model).config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="rope_factor"):
        load_hici(tmp_path, tmp_path, num_heads=4, context_mode="causal_shift", segment_len=8)
    assert worst(logits(load_hici(tmp_path, tmp_path, **SAID)), expected) < TOLERANCE
    assert worst(logits(load_hici(tiny(), tmp_path, **SAID)), expected) < TOLERANCE


def test_tied_embeddings(tmp_path):
    """One matrix for both ends: resized once, saved once, still tied."""
    model = tiny(tie_word_embeddings=True)
    model.resize_token_embeddings(98, mean_resizing=False)
    randomise_slots(apply_hici(model, hici_config()))
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1.5)
    save_hici(model, tmp_path / "slots")
    base = tiny(tie_word_embeddings=True)
    loaded = load_hici(base, tmp_path / "slots")
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    assert worst(logits(loaded), logits(model)) < TOLERANCE
    for keep in (True, False):
        merge_hici(loaded, tmp_path / f"merged-{keep}", keep_slots=keep)
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged-True")
    assert worst(logits(again), logits(model)) < TOLERANCE
    plain = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged-False")
    assert worst(logits(plain), logits(restore(model))) < TOLERANCE


def test_what_does_not_fit_is_refused_before_anything_changes(tmp_path):
    adapter, trainable = published(trained())
    write(tmp_path / "good", adapter, trainable)
    cases = {
        "layers": (tiny(num_hidden_layers=3), tmp_path / "good", "slots for 2 layers, the model has 3"),
        "hidden": (tiny(hidden_size=32, head_dim=8), tmp_path / "good", "hidden size 64, the model has 32"),
    }
    only = write(tmp_path / "only", adapter, trainable)
    (only / "trainable_params.safetensors").unlink()
    cases["adapter alone"] = (tiny(), only, "no trainable_params")
    gap = {k: v for k, v in trainable.items() if ".layers.0.self_attn." not in k}
    cases["gap"] = (tiny(), write(tmp_path / "gap", adapter, gap), "without gaps")
    holes = {k: v for k, v in trainable.items() if "1.self_attn.local_constructor.k_proj" not in k}
    cases["hole"] = (tiny(), write(tmp_path / "hole", adapter, holes), r"differ in local_constructor.k_proj")
    half = {k: v for k, v in adapter.items() if "layers.0.self_attn.q_proj.lora_B" not in k}
    cases["half"] = (tiny(), write(tmp_path / "half", half, trainable), "only one of the two LoRA matrices")
    none = {k: v for k, v in trainable.items() if "self_attn" not in k}
    cases["none"] = (tiny(), write(tmp_path / "none", adapter, none), "no tensors of local_constructor")
    cases["gone"] = (tiny(), tmp_path / "nowhere", "does not exist")
    for model, path, message in cases.values():
        before = logits(model)
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            load_hici(model, path, **SAID)
        assert torch.equal(logits(model), before)
    with pytest.raises(ValueError, match="neither a field"):
        load_hici(tiny(), tmp_path / "good", slots=3, **SAID)


def without(part):
    return lambda tensors: {k: v for k, v in tensors.items() if part not in k}


def changed(part, change):
    return lambda tensors: {k: change(v) if part in k else v for k, v in tensors.items()}


def with_more(name, *shape):
    return lambda tensors: tensors | {name: torch.ones(shape)}


def with_lora(module, a, b):
    at = f"base_model.model.model.layers.1.self_attn.{module}.lora_"
    return lambda tensors: tensors | {f"{at}A.weight": torch.ones(a), f"{at}B.weight": torch.ones(b)}


LC, GI = "local_constructor", "global_integrator"
# which file, what happens to it, what is said
DAMAGES = {
    "missing": (1, without(f"{LC}.v_proj"), rf"lacks model.layers.0.self_attn.{LC}.v_proj.weight"),
    "missing-scalar": (1, without("expand_scale_param"), r"lacks .*expand_scale_param of shape \(\)"),
    "missing-o-proj": (1, without(f"{LC}.o_proj"), rf"lacks .*{LC}.o_proj.weight of shape \(64, 16\)"),
    "unknown": (
        1,
        lambda x: {**x, **{k.replace("v_proj", "foo"): v.clone() for k, v in x.items()}},
        r"foo.*, which the model",
    ),
    "shape": (1, changed(f"{LC}.v_proj", lambda x: x[:, :5]), r"v_proj.weight must have .*\(16, 64\), got \(16, 5\)"),
    "broadcast": (1, changed(f"{LC}.k_proj", lambda x: x[:1]), r"k_proj.weight must have .*\(16, 64\), got \(1, 64\)"),
    "one-layer": (
        1,
        changed(f"1.self_attn.{LC}.mem", lambda x: x[:3]),
        r"layers.1.*must have shape \(5, 64\), got \(3",
    ),
    "flat": (
        1,
        changed("memory_slots", lambda x: x[0]),
        r"memory_slots of layer 0 must be \[M, H\], got shape \(64,\)",
    ),
    "flat-queries": (1, changed("global_queries", lambda x: x[0]), r"global_queries of layer 0 must be \[K, D\]"),
    "scalar": (1, changed("scale_param", lambda x: x.repeat(2)), r"scale_param must have shape \(\), got \(2,\)"),
    "norm": (1, changed("model.norm", lambda x: x[:1]), r"model.norm.weight must have shape \(64,\), got \(1,\)"),
    "head": (1, with_more("lm_head.weight", 97, 64), r"lm_head.weight must have shape \(98, 64\), got \(97, 64\)"),
    "embedding": (1, changed("embed_tokens", lambda x: x[0, 0]), r"embed_tokens.weight must have shape .*got \(\)"),
    "two-decoders": (1, with_more(f"layers.1.self_attn.{LC}.foo", 2), r"beside slots of another decoder"),
    "lora-shape": (0, changed(f"1.self_attn.{LC}.q_proj.lora_A", lambda x: x[:, :5]), r"q_proj is for \(16, 5\)"),
    "lora-unknown": (0, with_lora(f"{LC}.foo", (2, 64), (16, 2)), r"holds LoRA for model.layers.1.*foo, which"),
    "lora-inner": (0, changed(f"{GI}.v_proj.lora_B", lambda x: x[:, :1]), r"v_proj must be A \[rank, in\] and B"),
    "lora-ranks": (0, with_lora(f"{GI}.expand", (3, 16), (64, 3)), r"must have one rank, got \[2, 3\]"),
}


@pytest.mark.parametrize("merge_lora", [False, True])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_checkpoint_that_does_not_fit_changes_nothing(damage, merge_lora, tmp_path):
    file, change, message = DAMAGES[damage]
    tensors = [{k: v.clone() for k, v in part.items()} for part in published(trained(rows=98))]
    tensors[file] = {k: v.contiguous() for k, v in change(tensors[file]).items()}
    write(tmp_path, *tensors)
    model = tiny()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_hici(model, tmp_path, merge_lora=merge_lora, **{**SAID, "rope_factor": 2.0})
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[k], before[k]) for k in before)
    assert model.config.to_dict() == tiny().config.to_dict() and model.config._attn_implementation == "sdpa"
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("wrong", [{"rope_factor": 0.5}, {"lora_alpha": "16"}])
def test_wrong_factors_change_nothing(wrong, tmp_path):
    write(tmp_path, *published(trained(rows=98)))
    model = tiny()
    with pytest.raises(
        (ValueError, TypeError), match=f"{next(iter(wrong))} must be .*, got .*{next(iter(wrong.values()))}"
    ):
        load_hici(model, tmp_path, **{**SAID, **wrong})
    assert model.get_input_embeddings().weight.shape[0] == 97 and model.config.to_dict() == tiny().config.to_dict()


def test_scalars_stored_with_one_dimension(tmp_path):
    model = randomise_slots(apply_hici(tiny(), hici_config()))
    tensors = {k: v.detach().clone() for k, v in slots_of(model).items()}
    tensors = {k: v.reshape(1) if v.ndim == 0 else v for k, v in tensors.items()}
    save_file(tensors, tmp_path / "trainable_params.safetensors")
    assert worst(logits(load_hici(tiny(), tmp_path, **SAID)), logits(model)) < TOLERANCE


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("saved, loaded", [("bare", "bare"), ("bare", "head"), ("head", "bare")])
def test_models_without_a_head(saved, loaded, lora, tmp_path):
    """Their layers are at the top of the state dict."""
    peft = pytest.importorskip("peft")

    def make(kind):
        return tiny() if kind == "head" else tiny().model

    def features(model):
        decoder = next(m for m in model.modules() if type(m).__name__ == "LlamaModel")
        with torch.no_grad():
            return decoder(input_ids=prompt(), use_cache=False).last_hidden_state

    model = randomise_slots(apply_hici(make(saved), hici_config()))
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1.5)
    if lora:
        config = peft.LoraConfig(**LORA, init_lora_weights=False)
        model = peft.get_peft_model(model, config, autocast_adapter_dtype=False).eval()
    save_hici(model, tmp_path)
    found = load_hici(make(loaded), tmp_path)
    assert worst(features(found), features(model)) < TOLERANCE
    assert hasattr(found, "peft_config") == lora
    merged = load_hici(make(loaded), tmp_path, merge_lora=True)
    assert worst(features(merged), features(model)) < 1e-4


def test_merged_models_without_a_head(tmp_path):
    model = randomise_slots(apply_hici(tiny().model, hici_config()))
    for keep in (True, False):
        merge_hici(model, tmp_path / f"{keep}", keep_slots=keep)
    again = load_hici(tiny(), tmp_path / "True")
    assert (
        worst(
            slots_of(again)["model.layers.1.self_attn.local_constructor.memory_slots"],
            slots_of(model)["layers.1.self_attn.local_constructor.memory_slots"],
        )
        == 0
    )
    # as its own base it would get a random head
    with pytest.raises(ValueError, match=r"lacks lm_head.weight"):
        load_hici(tmp_path / "True", tmp_path / "True")
    merge_hici(load_hici(tiny(), tmp_path / "True"), tmp_path / "whole", keep_slots=True)
    bare = tiny().model
    before = {k: v.clone() for k, v in bare.state_dict().items()}
    with pytest.raises(ValueError, match=r"holds lm_head.weight, which the model does not have"):
        load_hici(bare, tmp_path / "whole")
    assert bare.state_dict().keys() == before.keys()


class _Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_no_code_is_run_from_weight_files(tmp_path):
    touched = tmp_path / "touched"
    folder = tmp_path / "evil"
    folder.mkdir()
    torch.save({"model.embed_tokens.weight": torch.zeros(2), "x": _Evil(touched)}, folder / "trainable_params.bin")
    for action in (
        lambda: load_hici(tiny(), folder, **SAID),
        lambda: convert(folder),
        lambda: extract(folder, tmp_path / "out"),
    ):
        with pytest.raises(ValueError, match="never runs code"):
            action()
    shards = tmp_path / "zero"
    shards.mkdir()
    torch.save(
        {"optimizer_state_dict": {"zero_stage": 2, "x": _Evil(touched)}}, shards / "zero_pp_rank_0_optim_states.pt"
    )
    with pytest.raises(ValueError, match="never runs code"):
        extract(shards, tmp_path / "out")
    fsdp = tmp_path / "fsdp"
    fsdp.mkdir()
    (fsdp / ".metadata").write_bytes(pickle.dumps(_Evil(touched)))
    with pytest.raises(ValueError, match="has no place"):
        extract(fsdp, tmp_path / "out")
    assert not touched.exists() and not (tmp_path / "out").exists()


def adapted(name: str = "default", **kwargs):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        randomise_slots(apply_hici(tiny(), hici_config())),
        peft.LoraConfig(**LORA, init_lora_weights=False, **kwargs),
        adapter_name=name,
        autocast_adapter_dtype=False,
    ).eval()
    with torch.no_grad():
        for own, p in model.named_parameters():
            if "modules_to_save" in own:
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(3)))
    return model


def test_adapters_of_any_name_keep_what_they_train_whole(tmp_path):
    model = adapted("mine", modules_to_save=["embed_tokens"])
    merge_hici(model, tmp_path / "merged", keep_slots=True)
    save_hici(model, tmp_path / "saved")
    merged, info = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not info["missing_keys"] and worst(logits(merged.eval()), logits(model)) < TOLERANCE
    assert worst(logits(load_hici(tiny(), tmp_path / "saved").eval()), logits(model)) < TOLERANCE


def test_adapters_that_are_not_lora_are_refused_before_anything_is_written(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.IA3Config(target_modules=["v_proj"], feedforward_modules=[], init_ia3_weights=False)
    model = peft.get_peft_model(apply_hici(tiny(), hici_config()), config)
    for save in (lambda: merge_hici(model, tmp_path / "a", keep_slots=True), lambda: save_hici(model, tmp_path / "a")):
        with pytest.raises(ValueError, match="expected LoRA"):
            save()
    assert not (tmp_path / "a").exists()


def test_an_adapter_that_is_merged_is_saved_once_it_is_not(tmp_path):
    model = adapted()
    expected = logits(model)
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        save_hici(model, tmp_path)
    assert not list(tmp_path.iterdir())
    model.unmerge_adapter()
    save_hici(model, tmp_path)
    save_hici(model, tmp_path)  # over an earlier one of its own kind
    assert worst(logits(load_hici(tiny(), tmp_path).eval()), expected) < TOLERANCE
    with pytest.raises(ValueError, match="path must hold no other adapter"):
        save_hici(randomise_slots(apply_hici(tiny(), hici_config())), tmp_path)
    assert worst(logits(load_hici(tiny(), tmp_path).eval()), expected) < TOLERANCE


def test_a_merged_directory_is_evaluated_as_what_it_is(tmp_path):
    from hici_kernels.evaluate.models import open_model
    from hici_kernels.integrations.chat import open_model as open_directory

    save_tokenizer(tmp_path)
    model = randomise_slots(apply_hici(tiny(), hici_config()))
    merge_hici(model, tmp_path, keep_slots=True)
    with_slots, without = logits(model), logits(restore(model))
    assert worst(with_slots, without) > 1e-3
    assert worst(logits(open_model(tmp_path, "hici").model), with_slots) < TOLERANCE
    for method in ("none", "hga", "dca"):
        assert worst(logits(open_model(tmp_path, method, attention="full").model), without) < TOLERANCE
    assert worst(logits(open_model(tmp_path, "none").model), without) < TOLERANCE
    assert open_directory(tmp_path, "hga")[0].config.hga
    with pytest.raises(ValueError, match="config is that of"):
        open_directory(tmp_path, "hici", config={"segment_len": 4})
    for wrong in ({"store": "disk"}, {"config": {"topk_groups": 3}}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            open_directory(tmp_path, "none", **wrong)
