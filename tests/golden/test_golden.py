"""Every reference fixture, addressed by its manifest (function, switches, parameter and input files)."""

from __future__ import annotations

import math

import golden_cases as gc
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hici_kernels.nn.hici_attention import HiCIAttention
from hici_kernels.nn.norm import RMSNorm
from hici_kernels.nn.prefix import build_prefix
from hici_kernels.ops.attention.api import attention
from hici_kernels.ops.global_stats.api import global_stats

GRADIENT = 5e-5
WORST = {"output": 0.0, "gradient": 0.0, "float64": 0.0}


def pytest_generate_tests(metafunc):
    if "case" not in metafunc.fixturenames:
        return
    found = gc.entries(metafunc.config.getoption("--golden-dir"))
    if metafunc.function is test_global_stats_bare:
        found = [x for x in found if x[2]["function"] in (gc.TRAIN, *gc.INTEGRATOR)]
        found = [x for x in found if gc.holds(x[0], x[2], "mid.L", "in.local_repr")]
    metafunc.parametrize("case", found, ids=[x[2]["name"] for x in found], indirect=True)


@pytest.fixture
def case(request):
    return gc.load(*request.param)


@pytest.fixture
def find(request):
    """A case by name, for the tests of single repairs; skipped where the directory does not hold it."""

    def one(name):
        for x in gc.entries(request.config.getoption("--golden-dir")):
            if x[2]["name"] == name:
                return gc.load(*x)
        pytest.skip(f"no case {name}")

    return one


def close(ours: Tensor, theirs: Tensor, tolerance: float, what: str, kind: str = "output") -> None:
    assert ours.shape == theirs.shape, what
    if ours.numel() == 0:
        return
    scale = max(1.0, theirs.abs().max().item()) if kind == "gradient" else 1.0
    error = (ours.double() - theirs.double()).abs().max().item() / scale
    if tolerance <= GRADIENT:
        WORST[kind] = max(WORST[kind], error)
    assert error <= tolerance, f"{what}: error {error:.3g} above {tolerance:g}"


@pytest.fixture(autouse=True, scope="module")
def report_worst():
    yield
    print("\nworst errors:", WORST)


def check_gradients(case: gc.Case, named: dict[str, Tensor]) -> None:
    for key, value in case.t.items():
        if key.startswith("grad.param."):
            grad = named[key.removeprefix("grad.param.")].grad
            assert grad is not None, key
            close(grad, value, GRADIENT, key, "gradient")
    for key in case.entry.get("params_without_grad", []):
        grad = named[key.removeprefix("param.")].grad if key.removeprefix("param.") in named else None
        assert grad is None or not grad.any(), f"{key} must have no gradient"


def test_case(case):
    if case.function in gc.LOCAL:
        check_local(case)
    elif case.function in gc.INTEGRATOR:
        check_integrator(case)
    elif case.function == "LocalConstructorFlashPlus":
        check_flashplus(case)
    elif case.function == "GlobalIntegrator_new":
        check_integrator_new(case)
    elif case.function == gc.MODEL:
        check_model(case)
    elif "in.hidden_prefill" in case.t:
        check_decode(case)
    elif case.function in (gc.WITH_CACHE, gc.GLOBAL_CACHE):
        check_recurrence(case)
    else:
        assert case.function in (gc.TRAIN, gc.NOFLASH, gc.INFER, *gc.FULL), case.function
        check_layer(case)


def check_local(case: gc.Case) -> None:
    module = gc.local_constructor(case)
    hidden = case.hidden.clone().requires_grad_()
    out = module(hidden, case.mask)[:, 0]
    close(out, case.t["out.out"], case.tolerance, "out")
    (out * case.t["in.grad_out"]).sum().backward()
    close(hidden.grad, case.t["grad.hidden_states"], GRADIENT, "grad.hidden_states", "gradient")
    check_gradients(case, dict(module.named_parameters()))


def check_integrator(case: gc.Case) -> None:
    module = gc.integrator(case)
    local = case.t["in.local_repr"].clone().requires_grad_()
    out = module(local, causal=case.t["out.out"].ndim == 4)
    close(out, case.t["out.out"], case.tolerance, "out")
    (out * case.t["in.grad_out"]).sum().backward()
    close(local.grad, case.t["grad.local_repr"], GRADIENT, "grad.local_repr", "gradient")
    check_gradients(case, dict(module.named_parameters()))


def check_flashplus(case: gc.Case) -> None:
    """By formula: the class takes the host layer's keys and values and is not part of this library."""
    p = {k: v.clone().requires_grad_() for k, v in case.params.items()}
    k, v = (case.t[f"in.{x}_states"].clone().requires_grad_() for x in ("key", "value"))
    q = (p["memory_slots"] @ p["q_proj.weight"].T).unflatten(-1, k.shape[2:])
    scores = torch.einsum("mhd,bthd->bhmt", q, k) * k.shape[-1] ** -0.5
    scores = scores.masked_fill(case.mask[:, None, None] == 0, torch.finfo(scores.dtype).min)
    out = torch.einsum("bhmt,bthd->bmhd", scores.softmax(-1), v).flatten(-2)
    out = out * (case.mask != 0).any(1)[:, None, None]
    close(out, case.t["out.out"], case.tolerance, "out")
    (out * case.t["in.grad_out"]).sum().backward()
    close(k.grad, case.t["grad.key_states"], GRADIENT, "grad.key_states", "gradient")
    close(v.grad, case.t["grad.value_states"], GRADIENT, "grad.value_states", "gradient")
    check_gradients(case, p)


def check_integrator_new(case: gc.Case) -> None:
    """By formula: the class keeps a moving average of G between calls and is not part of this library."""
    p = {k: v.clone().requires_grad_(v.is_floating_point()) for k, v in case.params.items()}
    local = case.t["in.local_repr"].clone().requires_grad_()
    before = case.t["in.ema_global_before"]
    x = local.flatten(1, 2)
    mean = x.mean(1)
    stats = [mean, x.amax(1), x.amin(1), x.std(1, unbiased=False), F.normalize(mean, dim=-1, eps=1e-12)]

    def compress(r: int, s: Tensor) -> Tensor:
        w, b = p[f"stat_compressors.{r}.1.weight"], p[f"stat_compressors.{r}.1.bias"]
        return F.layer_norm(s @ p[f"stat_compressors.{r}.0.weight"].T, w.shape, w, b, 1e-5)

    z = torch.stack([compress(r, s) for r, s in enumerate(stats)], 1)
    queries = p["global_queries"] + 0.1 * compress(0, before).detach()
    q = queries @ p["q_proj.weight"].T
    k, v = z @ p["k_proj.weight"].T, z @ p["v_proj.weight"].T
    plain = (q @ k.transpose(1, 2) * q.shape[-1] ** -0.5).softmax(-1) @ v @ p["expand.weight"].T
    out = p["expand_scale"] * plain
    close(out, case.t["out.out"], case.tolerance, "out")
    if "out.ema_global_after" in case.t:
        after = 0.95 * before + 0.05 * plain.mean(0, keepdim=True)
        close(after, case.t["out.ema_global_after"], case.tolerance, "ema_global_after")
    (out * case.t["in.grad_out"]).sum().backward()
    close(local.grad, case.t["grad.local_repr"], GRADIENT, "grad.local_repr", "gradient")
    check_gradients(case, p)


def padded(case: gc.Case, hidden: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Hidden states, mask and positions with the padding columns the published inference forward adds."""
    extra = -hidden.shape[1] % case.segment_len(hidden.shape[1])
    mask, positions = case.mask, case.t.get("in.position_ids")
    if not extra:
        return hidden, mask, positions
    if mask is None:
        mask = torch.ones(hidden.shape[:2], dtype=torch.int64)
    if positions is not None:
        positions = F.pad(positions, (0, extra))
    return F.pad(hidden, (0, 0, 0, extra)), F.pad(mask, (0, extra)), positions


def check_layer(case: gc.Case) -> None:
    s = case.hidden.shape[1]
    layer = case.layer(s)
    hidden = case.hidden.clone().requires_grad_()
    positions = case.t.get("in.position_ids")
    out = layer(hidden, positions=positions, attention_mask=case.mask)
    rows = torch.ones(hidden.shape[:2], dtype=torch.bool)
    if case.function == gc.NOFLASH and case.mask is not None:
        # this variant leaves padded query rows unspecified instead of zeroing them
        rows = case.mask != 0
    virtual = averages_virtual_padding(case)
    if not (virtual and case.mode == "none"):
        close(out[rows], case.t["out.attn_output"][rows], case.tolerance, "out.attn_output")
    if case.mask is not None:
        assert not out[case.mask == 0].any()
    if virtual:
        check_padded(case, layer)
    else:
        check_slots(case, layer, hidden, case.mask)
    if "out.past_key" in case.t:
        at = torch.arange(s) if positions is None else positions
        _, k, v = layer.project(hidden, at)
        close(k.transpose(1, 2), case.t["out.past_key"], case.tolerance, "out.past_key")
        close(v.transpose(1, 2), case.t["out.past_value"], case.tolerance, "out.past_value")
    if case.entry.get("gradients"):
        (out * case.t["grad_out"]).sum().backward()
        close(hidden.grad, case.t["grad.hidden_states"], GRADIENT, "grad.hidden_states", "gradient")
        check_gradients(case, dict(layer.named_parameters()))
    if "out.attn_output_f64" in case.t:
        wide = case.layer(s).double()(case.hidden.double(), positions=positions, attention_mask=case.mask)
        # the reference forms its rotation tables and the standard deviations in float32 even then
        close(wide, case.t["out.attn_output_f64"], 2e-6, "out.attn_output_f64", "float64")


def averages_virtual_padding(case: gc.Case) -> bool:
    """Whether the published inference forward adds padding to a last segment that has no token in some row."""
    s = case.hidden.shape[1]
    g = case.segment_len(s)
    if case.function != gc.INFER or s % g == 0 or s < g or case.mask is None:
        return False
    return not bool((case.mask[:, s - s % g :] != 0).any(1).all())


def check_padded(case: gc.Case, layer: HiCIAttention) -> None:
    """There the stored slots are averages over that padding too, so they are compared with it in place."""
    hidden, mask, positions = padded(case, case.hidden)
    check_slots(case, layer, hidden, mask)
    out = layer(hidden, positions=positions, attention_mask=mask)[:, : case.hidden.shape[1]]
    close(out, case.t["out.attn_output"], case.tolerance, "out.attn_output, padded")


def check_slots(case: gc.Case, layer: HiCIAttention, hidden: Tensor, mask: Tensor | None) -> None:
    local = layer.local_constructor(hidden, mask, layer.config.segment_len)
    if "mid.L" in case.t:
        close(local.flatten(0, 1), case.t["mid.L"], case.tolerance, "mid.L")
    if "mid.G" in case.t:
        slots = layer.global_integrator(local, causal=case.t["mid.G"].ndim == 4)
        close(slots, case.t["mid.G"], case.tolerance, "mid.G")


def check_recurrence(case: gc.Case) -> None:
    """The reference builds L from padding too: all rows by composition, rows without padding through the layer."""
    hidden = case.hidden.clone().requires_grad_()
    b, s = hidden.shape[:2]
    layer, positions = case.layer(s), case.t["in.position_ids"]
    config = layer.config
    g = config.segment_len
    q, k, v = layer.project(hidden, positions)
    if case.function == gc.GLOBAL_CACHE:
        local = layer.local_constructor(hidden, case.mask if masked_global(case, layer) else None)
        prefix_g, prefix_l, seen = local[:, 0], None, None
    else:
        local = layer.local_constructor(hidden, None, g)
        prefix_g, prefix_l, seen = build_prefix(config, local, layer.global_integrator)
    if "mid.L" in case.t:
        close(local.flatten(0, 1), case.t["mid.L"], case.tolerance, "mid.L")
    if "mid.G" in case.t:
        causal = case.t["mid.G"].ndim == 4
        close(layer.global_integrator(local, causal=causal), case.t["mid.G"], case.tolerance, "mid.G")
    (gk, gv), (lk, lv) = layer.project_slots(prefix_g), layer.project_slots(prefix_l)
    context = attention(
        q,
        k,
        v,
        segment_len=g,
        recurrence_len=config.recurrence_len,
        global_k=gk,
        global_v=gv,
        local_k=lk,
        local_v=lv,
        prefix_mask=seen,
        attention_mask=case.mask,
    )
    out = layer.o_proj(context.flatten(-2))
    close(out, case.t["out.attn_output"], case.tolerance, "out.attn_output")
    if case.entry.get("gradients"):
        (out * case.t["grad_out"]).sum().backward()
        close(hidden.grad, case.t["grad.hidden_states"], GRADIENT, "grad.hidden_states", "gradient")
        check_gradients(case, dict(layer.named_parameters()))
    if case.function == gc.WITH_CACHE:
        rows = torch.ones(b, dtype=torch.bool) if case.mask is None else (case.mask != 0).all(1)
        whole = layer(case.hidden, positions=positions, attention_mask=case.mask)
        close(whole[rows], case.t["out.attn_output"][rows], case.tolerance, "rows without padding")


def masked_global(case: gc.Case, layer: HiCIAttention) -> bool:
    """Whether this variant's one constructor call was given the mask; its stored L tells."""
    if "mid.L" not in case.t:
        return True
    ours = layer.local_constructor(case.hidden, case.mask).flatten(0, 1)
    return bool((ours - case.t["mid.L"]).abs().max() <= case.tolerance)


def check_decode(case: gc.Case) -> None:
    t, prompt = case.t, case.t["in.hidden_prefill"]
    b, s = prompt.shape[:2]
    layer = case.layer(s)
    cache = layer.new_cache(b)
    close(layer(prompt, cache=cache), t["out.prefill"], case.tolerance, "out.prefill")
    scrambled = scrambled_slots(case)
    steps = sorted(k for k in t if k.startswith("in.hidden_decode"))
    for key in steps:
        name = key.removeprefix("in.hidden_")
        out = layer(t[key], positions=t.get(f"in.position_ids_{name}"), cache=cache)
        if scrambled:
            assert (out - t[f"out.{name}"]).abs().max() > 1e-3, "the reference reads scrambled slots here"
        else:
            close(out, t[f"out.{name}"], case.tolerance, f"out.{name}")
    _, k, v = layer.project(prompt, torch.arange(s))
    parts = [(k, v)]
    if layer.config.decode == "slots":
        local = layer.local_constructor(prompt, None, layer.config.segment_len)
        pieces = (layer.global_integrator(local), local.flatten(1, 2))
        parts = [*(layer.project_slots(x) for x in pieces), (k, v)]
    begin = 0
    for i, part in enumerate(parts):
        for ours, key in zip(part, ("out.past_key", "out.past_value"), strict=True):
            theirs = t[key][:, :, begin : begin + ours.shape[1]].transpose(1, 2)
            if scrambled and i == 1:
                assert (ours - theirs).abs().max() > 1e-3
                theirs, ours = theirs.flatten().sort().values, ours.flatten().sort().values
            close(ours, theirs, case.tolerance, key)
        begin += part[0].shape[1]
    assert begin == t["out.past_key"].shape[2]
    for x, which in (("key", 1), ("value", 2)):
        if f"out.past_{x}_after_tail" in t:
            at = t.get("in.position_ids_decode", torch.tensor([s]))
            tail = layer.project(t[steps[-1]], at)[which].transpose(1, 2)
            close(tail, t[f"out.past_{x}_after_tail"], case.tolerance, f"past_{x}_after_tail")


def scrambled_slots(case: gc.Case) -> bool:
    """The published SFT cache reshapes its local slots without transposing back; "repaired" fixtures do not."""
    keeps = case.function == gc.SFT_INFER and case.globals.get("INCLUDE_HICI_IN_KV_CACHE", True)
    return bool(keeps) and "repaired" not in case.entry["reference"] + case.name


class Block(nn.Module):
    def __init__(self, case: gc.Case, params: dict[str, Tensor], s: int) -> None:
        super().__init__()
        own = {k.removeprefix("self_attn."): v for k, v in params.items() if k.startswith("self_attn.")}
        wide, hidden = params["mlp.gate_proj.weight"].shape
        self.self_attn = gc.build_layer(case, case.config(s, own), own)
        self.mlp = nn.ModuleDict(
            {
                "gate_proj": nn.Linear(hidden, wide, bias=False),
                "up_proj": nn.Linear(hidden, wide, bias=False),
                "down_proj": nn.Linear(wide, hidden, bias=False),
            }
        )
        self.input_layernorm = RMSNorm(hidden, 1e-6)
        self.post_attention_layernorm = RMSNorm(hidden, 1e-6)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), attention_mask=mask)
        y = self.post_attention_layernorm(x)
        return x + self.mlp["down_proj"](F.silu(self.mlp["gate_proj"](y)) * self.mlp["up_proj"](y))


def check_model(case: gc.Case) -> None:
    ids, mask, labels = (case.t[f"in.{k}"] for k in ("input_ids", "attention_mask", "labels"))
    p = case.params
    vocab, hidden = p["model.embed_tokens.weight"].shape
    count = 1 + max(int(k.split(".")[2]) for k in p if k.startswith("model.layers."))
    model = nn.Module()
    model.model = nn.Module()
    model.model.embed_tokens = nn.Embedding(vocab, hidden)
    model.model.norm = RMSNorm(hidden, 1e-6)
    model.lm_head = nn.Linear(hidden, vocab, bias=False)
    layers = []
    for i in range(count):
        head = f"model.layers.{i}."
        layers.append(Block(case, {k.removeprefix(head): v for k, v in p.items() if k.startswith(head)}, ids.shape[1]))
    model.model.layers = nn.ModuleList(layers)
    model.load_state_dict(p, strict=True)
    x = model.model.embed_tokens(ids)
    for layer in model.model.layers:
        x = layer(x, mask)
    logits = model.lm_head(model.model.norm(x))
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    close(logits, case.t["out.logits"], case.tolerance, "out.logits")
    close(loss.reshape(-1), case.t["out.loss"].reshape(-1), case.tolerance, "out.loss")
    loss.backward()
    check_gradients(case, dict(model.named_parameters()))


def test_global_stats_bare(case):
    """A LayerNorm follows every statistic in the modules and hides wrong factors, so none is between here."""
    slots = case.t.get("mid.L")
    local = case.t["in.local_repr"] if slots is None else slots.unflatten(0, (case.hidden.shape[0], -1))
    local = local.float()  # one fixture stores bfloat16, whose rounding would hide a wrong factor
    for upto in range(1, local.shape[1] + 1):
        x = local[:, :upto].flatten(1, 2).double()
        mean = x.sum(1) / x.shape[1]
        std = ((x - mean[:, None]).square().sum(1) / x.shape[1]).sqrt().clamp(min=1e-6)
        unit = mean / mean.square().sum(-1, keepdim=True).sqrt().clamp(min=1e-6)
        expected = torch.stack((mean, x.amax(1), x.amin(1), std, unit), 1)
        close(global_stats(local[:, :upto]), expected, 2e-5, f"segments 1..{upto}")
        close(global_stats(local.double(), causal=True)[:, upto - 1], expected, 1e-12, "float64", "float64")
    close(global_stats(local, causal=True)[:, -1], expected, 2e-5, "causal")


def test_repair_slots_in_cache_are_not_scrambled(find):
    bug, repaired = find("sft_gqa_infer_slots_in_cache"), find("sft_gqa_infer_slots_in_cache_repaired")
    assert scrambled_slots(bug) and not scrambled_slots(repaired)
    check_decode(bug)
    check_decode(repaired)


def test_repair_empty_segment_has_no_slots(find):
    """The reference averages padding into the slots of a segment without tokens ("uniform"); the default skips it."""
    case = find("llama_gqa_none_GL_emptyseg")
    uniform, skip = case.layer(32), case.layer(32, empty="skip")
    noise = torch.where((case.mask == 0)[:, :, None], torch.randn_like(case.hidden) * 10, case.hidden)
    moved = [
        (f(case.hidden, attention_mask=case.mask) - f(noise, attention_mask=case.mask)).abs().max()
        for f in (uniform, skip)
    ]
    assert moved[0] > 1e-3
    assert moved[1] <= 1e-6
    row = skip(case.hidden[1:, :24], attention_mask=case.mask[1:, :24])
    close(skip(case.hidden, attention_mask=case.mask)[1:, :24], row, 2e-6, "row without its empty segment")


@pytest.mark.parametrize("mode", ["causal_shift_g", "causal_gi_gonly"])
def test_repair_qwen3_knows_every_mode(find, mode):
    """The reference treats modes its Qwen3 file does not know as "none", which leaks the whole future."""
    case = find("qwen3_none_GL")
    case.globals["CAUSAL_CONTEXT_MODE"] = mode
    assert case.mode == "none"
    ours = case.layer(32, context_mode=mode)
    changed = case.hidden.clone()
    changed[:, -1] += 10
    before = slice(0, 24)
    assert (ours(case.hidden) - ours(changed))[:, before].abs().max() <= 1e-6
    reference = case.layer(32)
    assert (reference(case.hidden) - reference(changed))[:, before].abs().max() > 1e-4


@pytest.mark.parametrize("s", [5, 6, 7, 9, 10, 11, 13, 15, 50, 51])
def test_repair_every_length_works(find, s):
    """Lengths the reference's reshape refuses equal the same text padded to full segments."""
    case = find("llama_gqa_none_GL")
    layer = case.layer(32, segment_len=None, num_segments=4, empty="skip")
    hidden = torch.randn(1, s, case.hidden.shape[2])
    out = layer(hidden)
    extra = 4 * math.ceil(s / 4) - s
    mask = F.pad(torch.ones(1, s, dtype=torch.int64), (0, extra))
    close(out, layer(F.pad(hidden, (0, 0, 0, extra)), attention_mask=mask)[:, :s], 2e-5, f"length {s}")


def test_repair_fixed_segments_and_no_mask_and_long_continuation(find):
    """Length 50 in segments of 16, attention_mask=None, and 48 tokens on a cache: the reference raises."""
    case = find("llama_gqa_causal_shift_GL")
    layer = case.layer(32, segment_len=16)
    hidden = torch.randn(1, 50, case.hidden.shape[2])
    out = layer(hidden)
    close(out[:, :48], layer(hidden[:, :48]), 2e-5, "prefix")
    close(layer(hidden, attention_mask=torch.ones(1, 50)), out, 2e-6, "a mask of ones")
    cache = layer.new_cache(1)
    layer(hidden[:, :2], cache=cache)
    plain = case.layer(50, use_global=False, use_local=False, segment_len=50)
    close(layer(hidden[:, 2:], cache=cache), plain(hidden)[:, 2:], 2e-5, "continuation")


def test_repair_statistics_do_not_cancel_in_bfloat16():
    """E[x^2] - E[x]^2 in the reference's causal path loses a small spread around a large mean."""
    local = (100 + torch.randint(0, 3, (1, 6, 5, 16)) * 0.5).bfloat16()
    got = global_stats(local, causal=True)[:, :, 3].double()
    for i in range(6):
        expected = local[:, : i + 1].flatten(1, 2).double().std(1, unbiased=False).clamp(min=1e-6)
        assert ((got[:, i] - expected).abs() <= 2**-8 * expected + 1e-6).all()


@pytest.mark.parametrize("decode", ["full", "slots"])
def test_repair_decode_with_padding_at_batch_2(find, decode):
    """The reference indexes its mask out of range here; ours equals the row alone."""
    case = find("sft_gqa_infer_slots_in_cache_repaired")
    layer = case.layer(20, decode=decode, empty="skip")
    hidden, step = torch.randn(2, 20, 64), torch.randn(2, 1, 64)
    mask = torch.ones(2, 20, dtype=torch.int64)
    mask[1, :6] = 0
    positions = torch.stack((torch.arange(20), torch.arange(20) - 6)).clamp(min=0)
    cache = layer.new_cache(2)
    layer(hidden, positions=positions, attention_mask=mask, cache=cache)
    out = layer(step, positions=torch.tensor([[20], [14]]), cache=cache)
    alone = layer.new_cache(1)
    layer(hidden[1:, 6:], cache=alone)
    close(out[1:], layer(step[1:], cache=alone), 2e-6, "row 1")


def test_repair_masked_query_rows_are_zero(find):
    case = find("llama_gqa_noflash_none_GL")
    out = case.layer(32)(case.hidden, attention_mask=case.mask)
    assert not out[case.mask == 0].any()
    assert case.t["out.attn_output"][case.mask == 0].any()
