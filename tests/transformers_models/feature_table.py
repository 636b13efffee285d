"""Which feature of which model family is proved by which test: the source of the tables in docs/models.md.

python tests/transformers_models/feature_table.py writes the page; test_feature_table.py fails where it is stale or
names a test that does not exist.
"""

from __future__ import annotations

from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"
HERE = "tests/transformers_models"
TRAIN = "tests/train/test_train.py"

# heading -> family of tiny_models
FAMILIES = {
    "Llama": "llama",
    "Mistral": "mistral",
    "Qwen2": "qwen2",
    "Qwen3": "qwen3",
    "Qwen3-MoE": "qwen3-moe",
    "Gemma": "gemma",
    "partial rotary (StableLM)": "stablelm-partial",
    "scaled rotary (YaRN)": "llama-yarn",
}
HGA = tuple(FAMILIES.values())
HICI = HGA[:5]
DENSE = ("llama", "qwen3")

# feature -> test, "{}" for the family; and the families it is run for
Rows = dict[str, tuple[str, tuple[str, ...]]]
HGA_ROWS: Rows = {
    "prefill, decode, left-padded batch": ("test_hga.py::test_logits_equal_the_unmodified_model[{}]", HGA),
    "generate: greedy": ("test_hga.py::test_generate_equals_token_for_token[{}-greedy]", HGA),
    "generate: sampling": ("test_hga.py::test_generate_equals_token_for_token[{}-sampling]", HGA),
    "generate: beams": ("test_hga.py::test_generate_equals_token_for_token[{}-beams]", HGA),
    "chunked prefill": ("test_hga.py::test_generate_equals_token_for_token[{}-chunked-prefill]", HGA),
    "routes do not depend on the split": ("test_hga.py::test_routing_does_not_depend_on_the_split[{}]", HGA),
    "continued conversation": ("test_hga.py::test_continued_conversation[{}]", HGA),
    "cropping": ("test_hga.py::test_crop_is_as_if_the_tokens_had_not_come[5-{}]", HGA),
    "assisted, prompt-lookup decoding": ("test_hga.py::test_assisted_and_prompt_lookup_decoding[{}]", HGA),
    "training, gradient checkpointing": (
        "test_hga.py::test_gradient_checkpointing_and_training_with_a_cache[False-{}]",
        HGA,
    ),
    "torch.compile": ("test_hga.py::test_compile", ("llama",)),
    "PEFT LoRA": ("test_hga.py::test_lora[adapter-first]", ("llama",)),
    "save_pretrained, from_pretrained": ("test_hga.py::test_save_and_load[{}]", HGA),
    "device_map, disk offload": ("test_hga.py::test_device_map_and_offload", ("llama",)),
    "history in host memory": (
        "test_hga.py::test_every_tier_gives_the_same[host-{}]",
        ("llama", "qwen3", "qwen3-moe"),
    ),
    "history on disk": ("test_hga.py::test_every_tier_gives_the_same[disk-{}]", ("llama", "qwen3", "qwen3-moe")),
    "restore, bit for bit": ("test_hga.py::test_restore_gives_back_the_model_bit_for_bit", ("qwen3",)),
    "dual chunk attention, dense": ("test_baselines.py::test_dual_chunk_decode_is_the_prefill[{}-strategy0]", DENSE),
    "dual chunk attention, routed": (
        "test_baselines.py::test_routed_dual_chunk_attention[{}]",
        ("llama", "qwen3", "stablelm-partial"),
    ),
    "position interpolation": ("test_baselines.py::test_stretched_positions[{}-linear]", DENSE),
    "YaRN applied": ("test_baselines.py::test_stretched_positions[{}-yarn]", DENSE),
}
HICI_ROWS: Rows = {
    "the authors' two-layer model": ("test_hici.py::test_golden_two_layer_model", ("qwen3",)),
    "prefill, decode, left-padded batch, greedy": (
        "test_hici.py::test_generate_equals_the_uncached_model[{}]",
        HICI,
    ),
    "generate: sampling": ("test_hici.py::test_strategies_equal_recomputation[sampling-segment]", ("llama",)),
    "generate: beams": ("test_hici.py::test_strategies_equal_recomputation[beams-segment]", ("llama",)),
    "chunked prefill, conversation": (
        "test_hici.py::test_chunked_prefill_and_conversations_need_one_semantics",
        ("llama",),
    ),
    "cropping within the open segment": ("test_cache_properties.py::test_hici", ("qwen3",)),
    "assisted decoding is refused": ("test_hici.py::test_assisted_decoding_is_refused[segment]", ("llama",)),
    "packed documents": ("test_hici.py::test_packed_documents", ("llama",)),
    "training, gradient checkpointing": ("test_hici.py::test_training[{}]", HICI),
    "torch.compile": ("test_hici.py::test_compile", ("llama",)),
    "PEFT LoRA on host and slots": (
        "test_hici.py::test_lora_on_the_slots_too[{}]",
        ("llama", "mistral", "qwen3"),
    ),
    "save_pretrained, from_pretrained": ("test_hici.py::test_save_pretrained_and_from_pretrained[{}]", HICI),
    "device_map, low-memory loading": ("test_hici.py::test_low_memory_loading", ("llama",)),
    "published checkpoint layout": (
        "test_checkpoints.py::test_published_layout_round_trip[new-bin-{}]",
        DENSE,
    ),
    "merge, slots kept": ("test_checkpoints.py::test_merge_keeping_slots[{}]", DENSE),
    "merge, slots dropped": ("test_checkpoints.py::test_merge_dropping_slots[{}]", DENSE),
    "restore, bit for bit": ("test_hici.py::test_restore_gives_back_the_model_bit_for_bit", ("qwen3",)),
    "hici train": (f"{TRAIN}::test_a_run_does_what_the_recipe_says", ("llama",)),
}


def test_ids(rows: Rows) -> list[str]:
    """Every test named, in order, once."""
    return list(dict.fromkeys(_id(test, family) for test, families in rows.values() for family in families))


def _id(test: str, family: str) -> str:
    name = test.format(family)
    return name if name.startswith("tests/") else f"{HERE}/{name}"


def _table(rows: Rows, families: dict[str, str], first: int) -> list[str]:
    ids = test_ids(rows)
    lines = ["| | " + " | ".join(families) + " |", "|---|" + "---|" * len(families)]
    for feature, (test, served) in rows.items():
        cells = [str(first + ids.index(_id(test, f))) if f in served else "" for f in families.values()]
        lines.append(f"| {feature} | " + " | ".join(cells) + " |")
    return lines


def page() -> str:
    """The text of docs/models.md."""
    hici = {k: v for k, v in FAMILIES.items() if v in HICI}
    ids = [*test_ids(HGA_ROWS), *test_ids(HICI_ROWS)]
    lines = [
        "# Models of the transformers library",
        "",
        "Every number in a table is a test of the list below: it shows that feature for that family, on a small random",
        "model. An empty cell was not tested for that family; the code is the same for all. This page is written by",
        "`python tests/transformers_models/feature_table.py`, and a test fails when it names a test that is not there.",
        "",
        "Tested with the oldest and the newest supported release (`make matrix`); others raise an error on import.",
        "",
        "## HGA",
        "",
        *_table(HGA_ROWS, FAMILIES, 1),
        "",
        "Linear and Llama-3 scaled RoPE, Qwen2 and Gemma-3 with some sliding layers, Granite, OLMo-2, Phi and Phi-3:",
        "prefill, decode and left-padded batches, by further cases of test 1.",
        "",
        "## HiCI",
        "",
        *_table(HICI_ROWS, hici, 1 + len(test_ids(HGA_ROWS))),
        "",
        "## Tests",
        "",
        *(f"{i}. `{name}`" for i, name in enumerate(ids, 1)),
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
