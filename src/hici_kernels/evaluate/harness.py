"""LongBench, RULER and every other task of lm-evaluation-harness, with our methods as a model class."""

from __future__ import annotations

import os
from typing import Any

from .. import _checks, _optional
from .models import Evaluated, open_model

GROUPS = {"longbench": "longbench", "ruler": "ruler"}
#: RULER's tasks that lm-evaluation-harness builds without a download
RULER_OFFLINE = ("niah_single_1", "niah_multikey_2", "niah_multikey_3", "ruler_vt", "ruler_cwe", "ruler_fwe")


def require() -> None:
    """ImportError naming the extra."""
    reason = _optional.missing("lm_eval", "eval")
    if reason is not None:
        raise ImportError(reason)


def wrap(evaluated: Evaluated, *, max_length: int | None = None, batch_size: int = 1) -> Any:
    """An evaluated model of transformers as a model of lm-evaluation-harness."""
    require()
    from lm_eval.models.huggingface import HFLM

    return HFLM(
        pretrained=evaluated.model,
        tokenizer=evaluated.tokenizer,
        max_length=max_length,
        batch_size=batch_size,
        backend="causal",
    )


def register() -> type:
    """Make ``lm_eval --model hici --model_args pretrained=DIR,method=hga,topk_groups=32`` known; idempotent.

    Arguments besides pretrained, method, adapter, attention, device, max_length and batch_size are fields of the
    method's configuration.
    """
    require()
    from lm_eval.api.registry import MODEL_REGISTRY, register_model
    from lm_eval.models.huggingface import HFLM

    if "hici" in MODEL_REGISTRY:
        known = MODEL_REGISTRY["hici"]
        if isinstance(known, type):
            return known

    @register_model("hici")
    class HiCIHarnessModel(HFLM):
        """A local model directory with one of our methods applied."""

        def __init__(
            self,
            pretrained: str,
            method: str = "none",
            adapter: str | None = None,
            attention: str = "method",
            device: str = "cpu",
            max_length: int | None = None,
            batch_size: int | str = 1,
            max_batch_size: int | None = None,
            **config: Any,
        ) -> None:
            self.evaluated = open_model(
                pretrained, method, config=config, adapter=adapter, attention=attention, device=device or "cpu"
            )
            super().__init__(
                pretrained=self.evaluated.model,
                tokenizer=self.evaluated.tokenizer,
                max_length=max_length,
                batch_size=batch_size,
                max_batch_size=max_batch_size,
                backend="causal",
            )

    return HiCIHarnessModel


def run(
    evaluated: Evaluated,
    group: str,
    *,
    tasks: list[str] | None = None,
    lengths: list[int] | None = None,
    limit: int | None = None,
    include_path: str | None = None,
    offline: bool = True,
    seed: int = 0,
) -> dict[str, Any]:
    """Run a group of tasks, or the named ones, by the harness's own prompts and metrics.

    Args:
        group: "longbench" or "ruler". tasks: task names instead of the whole group.
        lengths: context lengths of RULER (default 4096).
        include_path: folder of further task files (YAML).
        offline: nothing is fetched; a task whose data is not on this machine fails with the harness's message.
    """
    _checks.integer("seed", seed, 0, 2**32 - 1)  # of numpy
    require()
    if offline:
        # read by huggingface_hub and datasets when they are imported, which the harness does
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    import lm_eval
    from lm_eval.tasks import TaskManager

    register()
    longest = max(lengths or [4096])
    metadata: dict[str, Any] = {"pretrained": evaluated.name}
    if group == "ruler":
        metadata["max_seq_lengths"] = lengths or [4096]
    names = tasks or [GROUPS.get(group, group)]
    found = lm_eval.simple_evaluate(
        model=wrap(evaluated),
        tasks=names,
        limit=limit,
        task_manager=TaskManager(include_path=include_path, metadata=metadata),
        metadata=metadata,
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        fewshot_random_seed=seed,
        log_samples=False,
        bootstrap_iters=0,
    )
    head = evaluated.describe(longest, seed)
    rows = []
    for task, metrics in found["results"].items():
        for name, value in metrics.items():
            # "metric,filter"; other entries describe the task
            if isinstance(value, (int, float)) and "," in name and "stderr" not in name:
                rows.append({**head, "task": task, "metric": name.split(",")[0], "value": float(value)})
    return {"task": group, "tasks": names, "limit": limit, "rows": rows, "versions": found.get("versions", {})}
