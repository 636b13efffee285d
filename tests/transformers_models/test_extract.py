"""hici extract: from what training runs leave, shards of several engines, to a published checkpoint."""

from __future__ import annotations

import collections
from pathlib import Path

import pytest

pytest.importorskip("transformers")

import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny, worst
from torch import Tensor
from trained_models import SAID, TOLERANCE, logits, trained

from hici_kernels.checkpoints import extract
from hici_kernels.integrations import load_hici


def training_state() -> dict[str, Tensor]:
    """What a training run's model holds: every tensor under PEFT's names, adapters named "default"."""
    return {k: v.detach().clone() for k, v in trained().state_dict().items()}


def check_extracted(out: Path, state: dict[str, Tensor]) -> None:
    adapter, trainable = load_file(out / "adapter_model.safetensors"), load_file(out / "trainable_params.safetensors")
    assert len(adapter) == 2 * 24 and len(trainable) == 2 * 20 + 2
    for name, x in state.items():
        if "lora" in name:
            assert torch.equal(adapter.pop(name.replace("default.", "")), x.float())
        elif any(part in name for part in ("embed", "norm", "local_constructor", "global_integrator")):
            assert torch.equal(trainable.pop(name[17:].replace(".base_layer.", ".")), x.float())
    assert not adapter and not trainable
    loaded = load_hici(tiny(), out, lora_alpha=4, **SAID)
    model = trained().eval()
    assert worst(logits(loaded), logits(model)) < TOLERANCE


def split(flat: Tensor, ranks: int) -> list[Tensor]:
    each = -(-flat.numel() // ranks)
    return list(torch.nn.functional.pad(flat, (0, each * ranks - flat.numel())).split(each))


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("stage", [2, 3])
def test_extract_from_zero_shards(stage, ranks, tmp_path):
    """Shards built by the optimizer's rules: groups flattened and split (2), every parameter split (3), some frozen."""
    state = training_state()
    step = tmp_path / "run" / "global_step7"
    step.mkdir(parents=True)
    (tmp_path / "run" / "latest").write_text("global_step7", encoding="utf-8")
    names = [k for k in state if "lora" in k or any(p in k for p in ("embed", "norm", "local_", "global_"))]
    frozen = [k for k in state if k not in names]
    groups = [names[::2], names[1::2]]
    shapes = [collections.OrderedDict((k, state[k].shape) for k in g) for g in groups]
    flats: list[list[Tensor]] = [[] for _ in range(ranks)]
    for g in groups:
        if stage == 2:
            pieces = split(torch.cat([state[k].flatten().float() for k in g]), ranks)
        else:
            per_name = [split(state[k].flatten().float(), ranks) for k in g]
            pieces = [torch.cat([p[r] for p in per_name]) for r in range(ranks)]
        for r in range(ranks):
            flats[r].append(pieces[r])
    key = "single_partition_of_fp32_groups" if stage == 2 else "fp32_flat_groups"
    for r in range(ranks):
        optimizer = {"zero_stage": stage, "partition_count": ranks, key: flats[r], "ds_version": "0.14"}
        torch.save({"optimizer_state_dict": optimizer}, step / f"zero_pp_rank_{r}_mp_rank_00_optim_states.pt")
        model = {"module": {}, "buffer_names": [], "param_shapes": shapes, "shared_params": {}}
        if stage == 2:
            model["frozen_param_shapes"] = {k: state[k].shape for k in frozen}
            model["frozen_param_fragments"] = {k: state[k] for k in frozen}
            name = "mp_rank_00_model_states.pt"
        else:
            model["frozen_param_shapes"] = {k: state[k].shape for k in frozen}
            model["frozen_param_fragments"] = {k: split(state[k].flatten(), ranks)[r] for k in frozen}
            name = f"zero_pp_rank_{r}_mp_rank_00_model_states.pt"
        if stage == 3 or r == 0:
            torch.save(model, step / name)
    counts = extract(tmp_path / "run", tmp_path / "out")
    assert counts == {"trainable_params": 42, "adapter_model": 48}
    check_extracted(tmp_path / "out", state)
    if ranks > 1:
        (step / "zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
        with pytest.raises(ValueError, match="holds 2 of 3 optimizer shards"):
            extract(tmp_path / "run", tmp_path / "other")
        assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("wrapped", [True, False])
def test_extract_from_a_sharded_checkpoint(wrapped, tmp_path):
    import torch.distributed.checkpoint as dcp

    state = training_state()
    held = {"model": state, "step": 3} if wrapped else state
    dcp.save(held, checkpoint_id=tmp_path / "run" / "pytorch_model_fsdp_0", no_dist=True)
    extract(tmp_path / "run", tmp_path / "out")
    check_extracted(tmp_path / "out", state)


def test_extract_from_plain_weights(tmp_path):
    state = training_state()
    (tmp_path / "run").mkdir()
    torch.save(state, tmp_path / "run" / "pytorch_model.bin")
    (tmp_path / "run" / "adapter_config.json").write_text('{"lora_alpha": 4, "r": 2}', encoding="utf-8")
    extract(tmp_path / "run", tmp_path / "out")
    check_extracted(tmp_path / "out", state)
    kept = tmp_path / "out" / "adapter_config.json"
    assert kept.is_file()
    (tmp_path / "run" / "adapter_config.json").unlink()
    said: list[str] = []
    extract(tmp_path / "run", tmp_path / "out", progress=said.append)
    assert f"kept, since the run has none: {kept}" in said and kept.is_file()
    extract(tmp_path / "run", tmp_path / "half", dtype=torch.bfloat16)
    assert {x.dtype for x in load_file(tmp_path / "half" / "adapter_model.safetensors").values()} == {torch.bfloat16}
    counts = extract(tmp_path / "run", tmp_path / "more", also=["lm_head.weight"])
    assert counts == {"trainable_params": 43, "adapter_model": 48}
    with pytest.raises(ValueError, match="holds no tensor 'head'"):
        extract(tmp_path / "run", tmp_path / "none", also=["head"])
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match="no weights this library knows"):
        extract(empty, tmp_path / "none")
    save_file({"model.embed_tokens.weight": torch.zeros(2, 2)}, empty / "model.safetensors")
    with pytest.raises(ValueError, match="none of local_constructor"):
        extract(empty, tmp_path / "none")


def test_extract_keeps_everything_trained_and_nothing_foreign(tmp_path):
    """What a run holds in the published layout already is taken whole; files of another checkpoint are not kept."""
    state = training_state()
    lora = {k: x for k, x in state.items() if "lora" in k}
    own = {k[17:].replace(".base_layer.", "."): x for k, x in state.items() if k not in lora}
    for name, held in (("lora", lora), ("whole", {})):
        (tmp_path / name).mkdir()
        save_file(own, tmp_path / name / "trainable_params.safetensors")
        if held:
            save_file(held, tmp_path / name / "adapter_model.safetensors")
    lines: list[str] = []
    extract(tmp_path / "whole", tmp_path / "out", progress=lines.append)
    assert set(load_file(tmp_path / "out" / "trainable_params.safetensors")) == set(own)
    assert not any("left out" in line for line in lines)
    index = tmp_path / "out" / "trainable_params.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "b"}}', encoding="utf-8")
    extract(tmp_path / "lora", tmp_path / "out")
    assert not index.exists()
    written = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    with pytest.raises(ValueError, match="must hold no other adapter"):
        extract(tmp_path / "whole", tmp_path / "out")
    with pytest.raises(ValueError, match="out must be another directory than the run"):
        extract(tmp_path / "out", tmp_path / "lora" / ".." / "out", dtype=torch.bfloat16)
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == written
    two = tmp_path / "two"
    two.mkdir()
    torch.save(state | {k.replace("default", "other"): x for k, x in lora.items()}, two / "pytorch_model.bin")
    with pytest.raises(ValueError, match="more than once: the run must carry one adapter"):
        extract(two, tmp_path / "none")
    torch.save(state, two / "pytorch_model.bin")
    extract(two, tmp_path / "published", progress=lines.append)
    assert any("left out, as of the base model: " in line for line in lines)


def test_damaged_shards_are_named(tmp_path):
    import torch.distributed.checkpoint as dcp

    step = tmp_path / "run" / "global_step7"
    step.mkdir(parents=True)
    optimizer, model = step / "zero_pp_rank_0_mp_rank_00_optim_states.pt", step / "mp_rank_00_model_states.pt"
    good = {"optimizer_state_dict": {"zero_stage": 2, "partition_count": 1, "single_partition_of_fp32_groups": []}}
    torch.save(good, optimizer)
    for content in ({}, {"param_shapes": 3}):
        torch.save(content, model)
        with pytest.raises(ValueError, match="global_step7 is not laid out as ZeRO leaves it"):
            extract(tmp_path / "run", tmp_path / "out")
    for damaged in (optimizer, model):
        held = damaged.read_bytes()
        for content in (b"", held[: len(held) // 2]):
            damaged.write_bytes(content)
            with pytest.raises(ValueError, match=f"{damaged.name} cannot be read as plain data"):
                extract(tmp_path / "run", tmp_path / "out")
        damaged.write_bytes(held)
    sharded = tmp_path / "sharded" / "fsdp"
    dcp.save(training_state(), checkpoint_id=sharded, no_dist=True)
    (shard,) = sharded.glob("*.distcp")
    for content in (shard.read_bytes()[:1000], None):
        shard.unlink() if content is None else shard.write_bytes(content)
        with pytest.raises(ValueError, match="fsdp cannot be read"):
            extract(tmp_path / "sharded", tmp_path / "out")
    assert not (tmp_path / "out").exists()
