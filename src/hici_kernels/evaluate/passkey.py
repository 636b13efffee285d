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
    key_line = f"The pass key is {key}. Remember it. {key} is the pass key."
    fixed = len(encode_prompt(tokenizer, "\n".join((TASK, "", key_line, "", QUESTION))))
    sentence = len(_encode(tokenizer, FILLER))
    copies = (length - fixed) // sentence
    if copies < 0:
        raise ValueError(f"length must be at least {fixed} tokens for a passkey prompt, got {length}")
    while True:
        before = round(depth * copies)
        lines = (TASK, FILLER * before, key_line, FILLER * (copies - before), QUESTION)
        ids = encode_prompt(tokenizer, "\n".join(lines))
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
        prompt_of(evaluated.tokenizer, length, 0.0, LARGEST_KEY - 1)  # refuses one that is too short
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


def _encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))
