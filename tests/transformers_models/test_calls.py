"""Calls that would silently attend over something else: whose cache it is, how a call ended, what positions say."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("transformers")

import torch
import transformers as hf
from tiny_models import ALL, FEW, SIZES, hici_config, prompt, randomise_slots, tiny, worst
from torch import Tensor, nn

from hici_kernels.integrations import (
    DCAConfig,
    HGACache,
    apply_dca,
    apply_hga,
    apply_hici,
    apply_shifted,
    load_hici,
    restore,
    save_hici,
)
from hici_kernels.integrations.packed import one_document

IDS = prompt(2, 40)


def hga(**options: Any) -> Any:
    return apply_hga(tiny(**options), ALL)


def hici(decode: str = "segment", **options: Any) -> Any:
    recurrence = {"recurrence_len": 3} if decode == "segment" else {}
    return randomise_slots(apply_hici(tiny(**options), hici_config(decode=decode, **recurrence)))


METHODS = {"hga": hga, "segment": hici, "full": lambda: hici("full")}


@pytest.fixture(autouse=True)
def no_gradients(request: pytest.FixtureRequest) -> Iterator[None]:
    with torch.set_grad_enabled("trains" in request.keywords):
        yield


@pytest.mark.parametrize("method", METHODS)
def test_a_cache_outlives_its_method_only_empty(method: str) -> None:
    model = METHODS[method]()
    cache = model(IDS[:, :39]).past_key_values
    restore(model)
    with pytest.raises(ValueError, match=r"filled by (HGA|HiCI), which the model no longer runs"):
        model(IDS[:, 39:], past_key_values=cache)
    cache.reset()
    assert worst(model(IDS, use_cache=False).logits, tiny()(IDS).logits) == 0


@pytest.mark.parametrize(
    "change", [hga, hici, lambda: apply_shifted(tiny(), 8), lambda: apply_dca(tiny(), DCAConfig(8, 4))]
)
def test_another_attention_implementation_is_refused(change: Callable[[], Any]) -> None:
    model = change()
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match=r"must stay '\w+', got 'sdpa': call restore\(model\)"):
        model(IDS)
    assert worst(restore(model)(IDS).logits, tiny()(IDS).logits) < 1e-5


def test_attention_that_is_called_twice_a_layer_is_refused_with_a_cache() -> None:
    torch.manual_seed(0)
    model: Any = hf.AutoModelForCausalLM.from_config(hf.DiffLlamaConfig(**SIZES)).eval()
    want = model(IDS, use_cache=False).logits
    apply_hga(model, ALL)
    assert worst(model(IDS, use_cache=False).logits, want) < 1e-5
    with pytest.raises(ValueError, match="layers attend twice in one call"):
        model(IDS)


@pytest.mark.parametrize("how", ["hga", "hici", "shifted", "dca"])
def test_a_pickled_model_runs_in_a_fresh_process(how: str, tmp_path) -> None:
    changed = {
        "hga": lambda: apply_hga(tiny(), FEW),
        "hici": hici,
        "shifted": lambda: apply_shifted(tiny(), 8),
        "dca": lambda: apply_dca(tiny(), DCAConfig(8, 4)),
    }[how]()
    torch.save(changed, tmp_path / "model.pt")
    torch.save((IDS, changed(IDS).logits), tmp_path / "want.pt")
    program = (
        "import sys, torch; m, (ids, want) = (torch.load(x, weights_only=False) for x in sys.argv[1:]);"
        "print(bool((m(ids).logits - want).abs().max() < 1e-5))"
    )
    files = [str(tmp_path / name) for name in ("model.pt", "want.pt")]
    done = subprocess.run([sys.executable, "-c", program, *files], capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "True", done.stderr


@pytest.mark.parametrize("exits", [1, 2, 3])
def test_early_exit_decoding_equals_plain(exits: int) -> None:
    """Its candidates come from the first layers alone, whose cache is cropped."""
    model, ids = tiny(num_hidden_layers=4), prompt(1, 30)
    options = {"max_new_tokens": 10, "do_sample": False, "assistant_early_exit": exits}
    want = model.generate(ids, **options)
    assert torch.equal(apply_hga(model, ALL).generate(ids, **options), want)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("count", [1, 10])
def test_a_cache_that_checkpointing_drops_is_an_error(method: str, count: int) -> None:
    model = METHODS[method]()
    cache = model(IDS[:, :-count]).past_key_values
    model.train()
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match=f"got {count} tokens of 40 without their cache"):
        model(IDS[:, -count:], past_key_values=cache)


class Stop(Exception):
    pass


def stopped(model: Any, layer: int, ids: Tensor, **options: Any) -> None:
    """A call that ends after the attention of a layer."""

    def stop(*_: object) -> None:
        raise Stop

    handle = model.model.layers[layer].mlp.register_forward_pre_hook(stop)
    with pytest.raises(Stop):
        model(ids, **options)
    handle.remove()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("first", [30, 0])
def test_a_call_that_did_not_end_is_noticed(method: str, first: int) -> None:
    model = METHODS[method]()
    full = model(IDS, use_cache=False).logits
    cache = model(IDS[:, :first]).past_key_values if first else hf.DynamicCache(config=model.config)
    stopped(model, 0, IDS[:, first : first + 1], past_key_values=cache)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"a call on it did not end\. Take that call's columns back with crop"):
            model(IDS[:, first + 1 : first + 3], past_key_values=cache)
    ahead = cache.get_seq_length() - first
    if method == "full" and not first:  # the first call is a prefill, which cannot be taken back in part
        cache.reset()
    else:
        cache.crop(-ahead)
    assert [layer.get_seq_length() for layer in cache.layers] == [first, first]
    if method != "full":
        assert worst(model(IDS[:, first:], past_key_values=cache).logits, full[:, first:]) < 1e-5


def test_crop_to_more_than_a_stopped_call_left_changes_nothing() -> None:
    model = hga()
    full = model(IDS, use_cache=False).logits
    cache = model(IDS[:, :30]).past_key_values
    stopped(model, 0, IDS[:, 30:35], past_key_values=cache)
    with pytest.raises(ValueError, match=r"left \[30, 30\] tokens a row: .* not to \[33, 33\]"):
        cache.crop(-2)
    cache.crop(-5)
    assert worst(model(IDS[:, 30:], past_key_values=cache).logits, full[:, 30:]) < 1e-5


def test_a_store_that_is_rewound_behind_its_cache_is_noticed() -> None:
    model = hga()
    full = model(IDS, use_cache=False).logits
    cache = HGACache(model)
    model(IDS, past_key_values=cache)
    cache.store.rewind(20)
    with pytest.raises(ValueError, match=r"was given \[40, 40\] tokens a row, its store holds \[20, 20\]"):
        model(IDS[:, 20:], past_key_values=cache)
    cache.crop(-20)
    assert worst(model(IDS[:, 20:], past_key_values=cache).logits, full[:, 20:]) < 1e-5


ROW = prompt(1, 40)
RESTARTS = torch.cat((torch.arange(13), torch.arange(27)))[None]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("training", [False, True])
def test_restarting_positions_are_refused_with_a_cache(method: str, training: bool) -> None:
    model = METHODS[method]().train(training)
    with torch.enable_grad(), pytest.raises(ValueError, match="position_ids restart within a row"):
        model(ROW, position_ids=RESTARTS)
    for position_ids in (None, torch.arange(40)[None] + 7, torch.arange(40)[None] * 3):
        model(ROW, position_ids=position_ids)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_restarting_positions_are_refused_in_compiled_calls(method: str, backend: str) -> None:
    torch._dynamo.reset()
    model = METHODS[method]()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    want = model(ROW, use_cache=False).logits
    assert worst(compiled(ROW, use_cache=False).logits, want) < 1e-5
    with pytest.raises(ValueError, match="position_ids restart within a row"):
        compiled(ROW, position_ids=RESTARTS, use_cache=False)
    assert worst(compiled(ROW, position_ids=torch.arange(40)[None], use_cache=False).logits, want) < 1e-5


def test_the_operation_one_document() -> None:
    x = torch.randn(1, 5, 2, 4, requires_grad=True)
    for bad in (False, True):
        at = torch.tensor([[0, 1, 2, 0, 1] if bad else [3, 4, 5, 6, 9]])
        if not bad:
            torch.library.opcheck(torch.ops.hici.one_document, (x, at, "HiCI"))
            with torch.enable_grad():
                (grad,) = torch.autograd.grad(torch.ops.hici.one_document(x, at, "HiCI").sum(), x)
            assert torch.equal(grad, torch.ones_like(x)) and one_document(x, at, "HiCI") is x
        else:
            with pytest.raises(ValueError, match="position_ids restart"):
                one_document(x, at, "HiCI")


def test_a_mask_of_the_callers_own_is_no_mask_of_documents() -> None:
    model = hici()
    want = model(ROW, position_ids=RESTARTS, use_cache=False).logits
    own = torch.block_diag(*[torch.ones(n, n).tril() for n in (13, 27)]).bool()[None, None]
    assert torch.equal(model(ROW, attention_mask=own, position_ids=RESTARTS, use_cache=False).logits, want)
    hole, joined = own.clone(), torch.ones(40, 40).tril().bool()[None, None]
    hole[0, 0, 30, 20] = False
    for mask in (hole, joined, torch.eye(40, dtype=torch.bool)[None, None], own.float()):
        with pytest.raises(ValueError, match="got a mask of shape"):
            model(ROW, attention_mask=mask, position_ids=RESTARTS, use_cache=False)


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (
            "MiniMaxConfig",
            {"layer_types": ["linear_attention", "full_attention"]},
            "LightningAttention, which has no config",
        ),
        ("DogeConfig", {}, "masks that depend on the keys"),
        ("MiMoV2FlashConfig", {}, "keys and values of one head dim"),
        ("Llama4TextConfig", {}, "attends within chunks"),
    ],
)
def test_what_cannot_be_served_is_refused_before_anything_has_changed(config: str, options: dict, message: str) -> None:
    model: nn.Module = hf.AutoModelForCausalLM.from_config(getattr(hf, config)(**SIZES, **options))
    before = {name: type(module) for name, module in model.named_modules()}
    for change in (lambda: apply_hga(model, ALL), lambda: apply_hici(model, hici_config())):
        with pytest.raises(ValueError, match=message):
            change()
        assert {name: type(module) for name, module in model.named_modules()} == before
        assert not any(module._forward_pre_hooks for module in model.modules())


def test_slots_of_offloaded_layers_are_where_these_run(tmp_path) -> None:
    accelerate = pytest.importorskip("accelerate")
    tiny().save_pretrained(tmp_path / "base")
    models = [hf.AutoModelForCausalLM.from_pretrained(tmp_path / "base") for _ in range(2)]
    accelerate.cpu_offload(models[0])
    for model in models:
        torch.manual_seed(3)
        apply_hici(model, hici_config(decode="segment"))
    assert torch.equal(*(m(IDS, use_cache=False).logits for m in models))
    trained = randomise_slots(models[1])
    save_hici(trained, tmp_path / "slots")
    offloaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    accelerate.cpu_offload(offloaded)
    with pytest.raises(ValueError, match=r"of the model is offloaded, so .* cannot be loaded into it"):
        load_hici(offloaded, tmp_path / "slots")
    assert not any("constructor" in name for name, _ in offloaded.named_parameters())
