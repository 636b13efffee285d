"""What adapters of PEFT train is saved, loaded and merged as a whole, or refused before anything is written."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

import torch
import transformers as hf
from tiny_models import hici_config, randomise_slots, tiny, worst
from trained_models import LORA, TOLERANCE, logits

from hici_kernels.integrations import apply_hici, load_hici, merge_hici, save_hici


def adapted(name: str = "default", sizes=None, **kwargs):
    model = peft.get_peft_model(
        randomise_slots(apply_hici(tiny(**(sizes or {})), hici_config())),
        peft.LoraConfig(**{**LORA, "init_lora_weights": False, **kwargs}),
        adapter_name=name,
        autocast_adapter_dtype=False,
    ).eval()
    with torch.no_grad():
        for own, p in model.named_parameters():
            if "modules_to_save" in own:
                p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(3)))
    return model


def test_adapters_of_any_name_keep_what_they_train_whole(tmp_path):
    model = adapted("mine", modules_to_save=["embed_tokens"])
    merge_hici(model, tmp_path / "merged", keep_slots=True)
    save_hici(model, tmp_path / "saved")
    merged, info = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not info["missing_keys"] and worst(logits(merged.eval()), logits(model)) < 1e-4
    assert worst(logits(load_hici(tiny(), tmp_path / "saved").eval()), logits(model)) < TOLERANCE


def test_adapters_that_are_not_lora_are_refused_before_anything_is_written(tmp_path):
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
    with pytest.raises(ValueError, match="must hold no other adapter"):
        save_hici(randomise_slots(apply_hici(tiny(), hici_config())), tmp_path)
    assert worst(logits(load_hici(tiny(), tmp_path).eval()), expected) < TOLERANCE


def test_biases_that_an_adapter_trains_are_saved(tmp_path):
    """And what else is named; both come back from the same file."""
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


@pytest.mark.parametrize("kind", ["use_dora", "lora_bias"])
def test_adapters_that_are_more_than_a_product_are_not_merged(kind, tmp_path):
    model = apply_hici(tiny("llama"), hici_config())
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], **{kind: True})
    with pytest.raises(ValueError, match=kind):
        merge_hici(peft.get_peft_model(model, lora), tmp_path, keep_slots=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("whole", [["lm_head"], ["embed_tokens", "lm_head"], ["up_proj"]])
def test_what_an_adapter_keeps_whole_is_saved(whole, tmp_path):
    """Any module, not only those that the published recipe trains."""
    model = adapted(modules_to_save=whole)
    save_hici(model, tmp_path)
    loaded = load_hici(tiny(), tmp_path).eval()
    assert worst(logits(loaded), logits(model)) < TOLERANCE
    assert worst(logits(load_hici(tiny(), tmp_path, merge_lora=True)), logits(model)) < 1e-4


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings:UserWarning")
@pytest.mark.parametrize("whole", [["lm_head"], ["embed_tokens"], ["embed_tokens", "lm_head"]])
def test_a_tied_head_that_an_adapter_has_parted(whole, tmp_path):
    """It or the embedding was trained alone: both are in the checkpoint, and the loaded model ties them no more."""
    tied = {"tie_word_embeddings": True}
    model = adapted(sizes=tied, modules_to_save=whole)
    expected = logits(model)
    save_hici(model, tmp_path / "saved")
    merge_hici(model, tmp_path / "merged", keep_slots=True)
    for loaded in (load_hici(tiny(**tied), tmp_path / "saved", merge_lora=m) for m in (False, True)):
        assert worst(logits(loaded), expected) < 1e-4
        loaded.tie_weights()  # as loading and resizing do: a matrix of its own stays one
        assert worst(logits(loaded), expected) < 1e-4
    save_hici(load_hici(tiny(**tied), tmp_path / "saved"), tmp_path / "again")
    assert worst(logits(load_hici(tiny(**tied), tmp_path / "again")), expected) < 1e-4
    merged = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not merged.config.tie_word_embeddings and worst(logits(merged), expected) < 1e-4


def test_a_head_saved_under_both_names_stays_tied(tmp_path):
    tied = {"tie_word_embeddings": True}
    model = randomise_slots(apply_hici(tiny(**tied), hici_config()))
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1.5)
    save_hici(model, tmp_path, also=["lm_head.weight"])
    loaded = load_hici(tiny(**tied), tmp_path)
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight and loaded.config.tie_word_embeddings
    assert worst(logits(loaded), logits(model)) < TOLERANCE


def test_scales_and_ranks_that_differ_between_modules(tmp_path):
    """rsLoRA, alpha patterns and rank patterns: the loaded model computes, and merges, what the trained one does."""
    model = adapted(
        use_rslora=True,
        alpha_pattern={"q_proj": 7, r"layers\.1\.self_attn\.v_proj": 1},
        rank_pattern={"k_proj": 3, "o_proj": 5},
    )
    expected = logits(model)
    save_hici(model, tmp_path / "saved")
    merge_hici(model, tmp_path / "merged", keep_slots=True)
    loaded = load_hici(tiny(), tmp_path / "saved").eval()
    assert worst(logits(loaded), expected) < TOLERANCE
    scales = {n: m.scaling["default"] for n, m in model.named_modules() if hasattr(m, "lora_A")}
    assert {n: m.scaling["default"] for n, m in loaded.named_modules() if hasattr(m, "lora_A")} == scales
    assert len(set(scales.values())) == 5
    assert worst(logits(load_hici(tiny(), tmp_path / "saved", merge_lora=True)), expected) < 1e-4
    assert worst(logits(hf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), expected) < 1e-4
    save_hici(loaded, tmp_path / "again")
    assert worst(logits(load_hici(tiny(), tmp_path / "again")), expected) < TOLERANCE
    plain = load_hici(tiny(), tmp_path / "saved", lora_alpha=8, merge_lora=True)
    assert worst(logits(plain), expected) > 1e-3


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"lora_bias": True}, "lora_bias"),
        ({"target_parameters": ["mlp.experts"]}, "target_parameters"),
        ({"alpha_pattern": {"q_proj(": 2}}, r"alpha_pattern must map expressions to numbers, got 'q_proj\('"),
        ({"alpha_pattern": {"q_proj": "2"}}, "alpha_pattern.*must be a number"),
    ],
)
def test_adapter_configs_that_say_more_are_refused(said, message, tmp_path):
    save_hici(adapted(), tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | said), encoding="utf-8")
    model = tiny()
    before = logits(model)
    with pytest.raises((ValueError, TypeError), match=message):
        load_hici(model, tmp_path)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_adapters_that_change_the_base_are_merged_only(start, tmp_path):
    """What they take out of the weights beside them, a base model and the adapter do not give again."""
    model = adapted(init_lora_weights=start)
    with pytest.raises(ValueError, match=f"init_lora_weights must be .*'{start}'"):
        save_hici(model, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    merge_hici(model, tmp_path / "merged", keep_slots=True)
    assert worst(logits(hf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), logits(model)) < 1e-4


def test_tokens_trained_alone_are_refused(tmp_path):
    model = adapted(trainable_token_indices=[1, 2])
    for save in (lambda: merge_hici(model, tmp_path / "a", keep_slots=True), lambda: save_hici(model, tmp_path / "a")):
        with pytest.raises(ValueError, match="expected LoRA"):
            save()
    assert not (tmp_path / "a").exists()
