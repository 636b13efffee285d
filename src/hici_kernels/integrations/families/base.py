"""What the HiCI form of every model family has in common."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM

from ...config import HiCIConfig


class HiCIModel:
    """Mixin of a causal language model that is built with slots, so that from_pretrained fills them directly.

    Weights are built on the meta device there, so loading needs no more memory than the checkpoint, and device_map,
    dtype and quantised loading work as for any model.
    """

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        from ..hici import apply_hici

        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        if not config.hici:
            raise ValueError(f"a {type(config).__name__} needs `hici`, the fields of a HiCIConfig")
        apply_hici(self, HiCIConfig.from_dict(config.hici))  # type: ignore[arg-type]

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As usual; slots missing from the checkpoint are an error, not new random ones."""
        wanted = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)  # type: ignore[misc]
        missing = sorted(k for k in info["missing_keys"] if ".local_constructor." in k or ".global_integrator." in k)
        if missing:
            raise ValueError(
                f"the checkpoint lacks {len(missing)} HiCI tensors, first {missing[0]}; for new slots load the plain "
                "model and call apply_hici"
            )
        return (model, info) if wanted else model


def register(config_class: Any, model_class: Any) -> None:
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    AutoModelForCausalLM.register(config_class, model_class, exist_ok=True)
