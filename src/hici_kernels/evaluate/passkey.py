"""Passkey retrieval: a number hidden in filler, asked for at the end; accuracy by length and depth."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import _checks
from .._outputs import progress
from .generation import continue_greedily
from .models import Evaluated
from .tokens import encode_prompt

TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. I will quiz you "
    "about the important information there."
)
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
QUESTION = "What is the pass key? The pass key is"
#: the published key is drawn from [1, 50000)
LARGEST_KEY = 50000


def prompt_of(tokenizer: Any, length: int, depth: float, key: int) -> list[int]:
    """Token ids of a prompt of at most ``length`` tokens with the key after the share ``depth`` of the filler.

    The published lines: task, filler, "The pass key is X. Remember it. X is the pass key.", filler, question. Filler is
    cut at token level so that the length is met to a sentence.
    """
    copies = (length - _fixed(tokenizer, length, key)) // len(_encode(tokenizer, FILLER))
    while True:
        before = round(depth * copies)
        ids = encode_prompt(tokenizer, _text(key, before, copies - before))
        if len(ids) <= length or copies == 0:
            return ids
        copies -= 1


def run(
    evaluated: Evaluated, lengths: list[int], depths: list[float], *, trials: int = 5, seed: int = 0
) -> dict[str, Any]:
    """Accuracy per length and depth: exact match of the key's tokens in as many new tokens, keys drawn by ``seed``."""
    _checks.integer("trials", trials, 1)
    _checks.integer("seed", seed, 0)
    for depth in depths:
        if not 0 <= depth <= 1:
            raise ValueError(f"depth must be between 0 and 1, got {depth}")
    for length in lengths:
        _fixed(evaluated.tokenizer, length, LARGEST_KEY - 1)
    heads, cells = [], []
    plan = [(n, d) for n in lengths for d in depths]
    for length in lengths:
        heads.append(evaluated.describe(length, seed))
    for length, depth in progress(plan, "passkey"):
        hits, asked = 0, []
        for trial in range(trials):
            key = int(np.random.default_rng([seed, length, round(depth * 1000), trial]).integers(1, LARGEST_KEY))
            ids = prompt_of(evaluated.tokenizer, length, depth, key)
            # the space belongs to the answer: many tokenizers join it to the digits
            answer = _encode(evaluated.tokenizer, f"{QUESTION} {key}")[len(_encode(evaluated.tokenizer, QUESTION)) :]
            hits += continue_greedily(evaluated, ids, len(answer)) == answer
            asked.append(len(ids))
        cells.append(
            {"length": length, "depth": depth, "accuracy": hits / trials, "trials": trials, "tokens": max(asked)}
        )
    return {"task": "passkey", "rows": heads, "cells": cells}


def _text(key: int, before: int, after: int) -> str:
    key_line = f"The pass key is {key}. Remember it. {key} is the pass key."
    return "\n".join((TASK, FILLER * before, key_line, FILLER * after, QUESTION))


def _fixed(tokenizer: Any, length: int, key: int) -> int:
    """Tokens of a prompt without filler.

    Raises:
        ValueError: ``length`` is less.
    """
    fixed = len(encode_prompt(tokenizer, _text(key, 0, 0)))
    if length < fixed:
        raise ValueError(f"length must be at least {fixed} tokens for a passkey prompt, got {length}")
    return fixed


def _encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))
