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


@pytest.mark.parametrize("around", [False, True])
def test_a_model_built_with_slots_is_restored_to_a_plain_one(around, tmp_path):
    """Its class and what it saves are those of its family; what it was can be made of it again."""
    save_of = randomise_slots(apply_hici(tiny(), hici_config()))
    merge_hici(save_of, tmp_path / "slots", keep_slots=True)
    model = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "slots")
    assert type(model).__name__ == "HiCILlamaForCausalLM"
    expected = logits(restore(save_of))
    if around:
        peft = pytest.importorskip("peft")
        adapted = peft.get_peft_model(model, peft.LoraConfig(**LORA))
        restore(adapted)
        model = adapted.unload()
    restore(model)
    assert type(model) is hf.LlamaForCausalLM and type(model.config) is hf.LlamaConfig
    assert worst(logits(model), expected) < TOLERANCE
    model.save_pretrained(tmp_path / "plain")
    content = json.loads((tmp_path / "plain" / "config.json").read_text(encoding="utf-8"))
    assert content["architectures"] == ["LlamaForCausalLM"] and content["model_type"] == "llama"
    assert "hici" not in content
    assert type(hf.AutoModelForCausalLM.from_pretrained(tmp_path / "plain")) is hf.LlamaForCausalLM
    apply_hici(model, hici_config())
    assert type(model.config).__name__ == "HiCILlamaConfig"


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
