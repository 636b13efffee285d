"""A conversation with a local model: its text so far, its cache, what a turn cost."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import _checks
from ..config import HGAConfig
from .hga import apply_hga, check_store
from .hga_cache import HGACache
from .hici_cache import HiCILayer
from .host import Host, restore
from .load import load_hici

METHODS = ("hga", "hici", "none")


@dataclass
class Turn:
    """What one answer cost. prompt_tokens: those read in this turn; reused_tokens: those the cache still held."""

    text: str
    prompt_tokens: int
    reused_tokens: int
    new_tokens: int
    prefill_s: float
    decode_s: float
    memory: dict[str, int]

    @property
    def tokens_per_s(self) -> float:
        """Of decoding; the first token belongs to the prefill."""
        return (self.new_tokens - 1) / self.decode_s if self.new_tokens > 1 and self.decode_s > 0 else 0.0

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "tokens_per_s": self.tokens_per_s}


def open_model(
    directory: str | Path,
    method: str,
    *,
    config: dict[str, Any] | None = None,
    adapter: str | Path | None = None,
    store: str = "device",
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    **options: Any,
) -> tuple[nn.Module, Any]:
    """A model directory with a method applied, and its tokenizer; slots it carries act with method "hici" only.

    ``config``: fields of HGAConfig or HiCIConfig; for "hici" without an adapter the directory must be a merged one.
    ``store`` and ``options``: of :func:`apply_hga`, for method "hga" alone.

    Raises:
        ValueError, TypeError: naming the argument; what can be told without the model, before it is read.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory = Path(directory)
    if not (directory / "config.json").is_file():
        raise ValueError(f"{directory} is not a model directory: it has no config.json")
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if adapter is not None and method != "hici":
        raise ValueError(f"adapter is for method 'hici', got method={method!r} with {str(adapter)!r}")
    if method == "none" and config:
        raise ValueError(f"config must be empty with method='none', got {next(iter(config))}")
    place = _checks.device("device", device)
    if method == "hga":
        routed = HGAConfig.from_dict(dict(config or {}))
        check_store(store, options)
    elif store != "device":
        raise ValueError(f"store is for method 'hga', got method={method!r} with store={store!r}")
    elif options:
        raise ValueError(f"{next(iter(options))} is an option of the store of method 'hga', got method={method!r}")
    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    model: nn.Module = AutoModelForCausalLM.from_pretrained(directory, local_files_only=True, dtype=dtype or "auto")
    values = dict(config or {})
    carries = any(n.method == "apply_hici" for n in Host.of(model).notes)
    if carries and method != "hici":
        restore(model)
    elif carries and values:
        raise ValueError(f"config is that of {directory}, which carries its slots, got {next(iter(values))}")
    if method == "hici" and adapter is not None:
        model = load_hici(model, adapter, merge_lora=True, **values)
    elif method == "hici" and not carries:
        if not (values and _has_slots(directory)):
            raise ValueError(
                f"{directory} says nothing of slots: give a HiCI checkpoint for it, or a merged directory and the "
                "HiCIConfig fields that shapes cannot tell"
            )
        model = load_hici(model, directory, **values)
    model = model.to(place).eval()
    if method == "hga":
        apply_hga(model, routed, store=store, **options)
    return model, tokenizer


def _has_slots(directory: Path) -> bool:
    from .published import read

    try:
        return bool(read(directory, slots_only=True).slots)
    except ValueError:
        return False


class Conversation:
    """Messages, the tokens the cache holds, and the cache.

    A turn reads only what the cache does not hold: the cache is taken back to the common beginning of the old and the
    new text (a chat template may rewrite earlier turns) and starts anew where it cannot go back.
    """

    def __init__(self, model: nn.Module, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.messages: list[dict[str, str]] = []
        self.held = torch.zeros(1, 0, dtype=torch.int64)
        self.cache: Any = None

    def say(
        self,
        text: str,
        *,
        max_new_tokens: int = 256,
        show: Callable[[str], None] | None = None,
        stop: Callable[[], bool] | None = None,
        **generation: Any,
    ) -> Turn:
        """One turn: the answer's text goes to ``show`` as it comes. Greedy unless ``generation`` says otherwise.

        ``stop`` is asked after every token whether the answer ends there. A turn that an exception ends has not been:
        the messages are those from before, and the cache, of which nobody knows what it read, is freed.
        """
        before = list(self.messages)
        try:
            return self._turn(text, max_new_tokens, show or (lambda piece: None), stop or (lambda: False), generation)
        except BaseException:
            self.messages = before
            self.close()
            raise

    def _turn(
        self,
        text: str,
        max_new_tokens: int,
        show: Callable[[str], None],
        stop: Callable[[], bool],
        generation: dict[str, Any],
    ) -> Turn:
        from transformers import StoppingCriteriaList, TextStreamer

        self.messages.append({"role": "user", "content": text})
        ids = self._tokens()
        reused = self._take_back(ids)
        clock = _Clock()

        class Streamer(TextStreamer):
            def put(self, value: Tensor) -> None:
                if not self.next_tokens_are_prompt:
                    clock.token()
                super().put(value)

            def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
                show(text)

        def asked(ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
            return torch.full((len(ids),), stop(), dtype=torch.bool, device=ids.device)

        streamer = Streamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        with torch.no_grad():
            out = self.model.generate(  # type: ignore[operator]
                ids,
                attention_mask=torch.ones_like(ids),
                past_key_values=self.cache,
                max_new_tokens=max_new_tokens,
                streamer=streamer,
                stopping_criteria=StoppingCriteriaList([asked]),
                **{"do_sample": False, **generation},
            )
        answer = self.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        self.messages.append({"role": "assistant", "content": answer})
        # the last token has been chosen but not read
        self.held = out[:, :-1].cpu()
        return Turn(
            answer,
            ids.shape[1] - reused,
            reused,
            out.shape[1] - ids.shape[1],
            clock.prefill,
            clock.decode,
            self.memory(),
        )

    def memory(self) -> dict[str, int]:
        """Bytes the cache holds, by tier."""
        if isinstance(self.cache, HGACache):
            return dict(self.cache.stats().get("resident_bytes", {}))
        layers = [] if self.cache is None else self.cache.layers
        held = [x.cache for x in layers if isinstance(x, HiCILayer) and x.cache is not None]
        plain = [x for layer in layers for x in (layer.keys, layer.values) if isinstance(x, Tensor)]
        return {"device": sum(c.nbytes for c in held) + sum(x.nbytes for x in plain)}

    def close(self) -> None:
        """Free the cache and its files."""
        if self.cache is not None:
            self.cache.reset()
        self.cache, self.held = None, self.held[:, :0]

    def _tokens(self) -> Tensor:
        if getattr(self.tokenizer, "chat_template", None):
            ids = self.tokenizer.apply_chat_template(self.messages, add_generation_prompt=True, tokenize=True)
            ids = ids["input_ids"] if not isinstance(ids, list) else ids
            found = torch.tensor([ids])
        else:
            text = "\n".join(m["content"] for m in self.messages)
            found = self.tokenizer(text, return_tensors="pt")["input_ids"]
        if found.shape[1] == 0:
            raise ValueError("the text has no tokens")
        return found.to(next(self.model.parameters()).device)

    def _take_back(self, ids: Tensor) -> int:
        """Bring the cache to the longest beginning of ``ids`` it can hold; how many tokens that is."""
        length = min(self.held.shape[1], ids.shape[1] - 1)
        same = self.held[0, :length] == ids[0, :length].cpu()
        common = length if bool(same.all()) else int(same.to(torch.uint8).argmin())
        if self.cache is not None and common < self.held.shape[1]:
            try:
                if common == 0:
                    raise ValueError("nothing in common")
                self.cache.crop(common - self.held.shape[1])
            except ValueError:
                self.close()
        if self.cache is None:
            self.cache, common = self._new_cache(), 0
        return common

    def _new_cache(self) -> Any:
        from transformers import DynamicCache

        host = Host.of(self.model)
        if any(n.method == "apply_hga" for n in host.notes):
            return HGACache(self.model)
        return DynamicCache(config=host.decoder.config)


class _Clock:
    """Time to the first token and from there to the last."""

    def __init__(self) -> None:
        self.start = self.first = self.last = time.perf_counter()
        self.tokens = 0

    def token(self) -> None:
        self.last = time.perf_counter()
        if not self.tokens:
            self.first = self.last
        self.tokens += 1

    @property
    def prefill(self) -> float:
        return self.first - self.start

    @property
    def decode(self) -> float:
        return self.last - self.first
