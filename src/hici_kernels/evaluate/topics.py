"""Topic retrieval in the form of LongChat's test: which topic did a long conversation begin with? Scored by rules."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from .. import _checks
from .._outputs import progress
from .generation import continue_greedily
from .models import Evaluated
from .tokens import encode_prompt

QUESTION = "\n ASSISTANT: The first topic we discussed was"
STOPS = ("\n USER:", "\nUSER:", " USER:", "\n")
NEW_TOKENS = 50
TOPICS = (5, 10, 15, 20, 25)
_SUBJECTS = (
    "the history of tea", "how tides work", "caring for houseplants", "the rules of chess", "training for a marathon",
    "baking sourdough bread", "the life of bees", "building a shed", "learning to sail", "the moons of Jupiter",
    "repairing bicycles", "choosing a camera", "medieval castles", "growing tomatoes", "how vaccines are tested",
    "writing short stories", "the art of fresco", "keeping a budget", "the geology of Iceland", "playing the cello",
    "restoring furniture", "the migration of birds", "making cheese", "urban planning", "the physics of rainbows",
    "folding paper cranes", "first aid", "the invention of the telegraph", "coral reefs", "brewing coffee",
)  # fmt: skip
_ASKS = ("Could you tell me more about {}?", "What should a beginner know about {}?", "Why does {} interest people?")
_SAYS = (
    "Gladly. People who take up {} often say that the first weeks decide whether it stays with them.",
    "There is a lot to say about {}, and much of it is found in small local clubs rather than in books.",
    "With {}, patience counts for more than talent, and a friend who knows the subject for more than patience.",
)


def make_case(topics: int, seed: int, index: int) -> dict[str, Any]:
    """One conversation: {"prompt", "topics"}, drawn from our own subjects and sentences by ``seed`` and ``index``."""
    _checks.integer("topics", topics, 1, len(_SUBJECTS))
    rng = np.random.default_rng([seed, topics, index])
    chosen = [_SUBJECTS[i] for i in rng.permutation(len(_SUBJECTS))[:topics]]
    lines = [
        "Below is a record of our previous conversation on several topics. At the end I will ask you to recall the "
        "first topic."
    ]
    for n, topic in enumerate(chosen):
        opening = "I would like to discuss" if n == 0 else "Thank you. Now let us turn to"
        lines.append(f" USER: {opening} the topic of {topic}.\n ASSISTANT: Sure, let us talk about {topic}.")
        for i in rng.permutation(len(_ASKS)):
            lines.append(f" USER: {_ASKS[i].format(topic)}\n ASSISTANT: {_SAYS[i].format(topic)}")
    lines.append(
        " USER: Great, this is the end of our discussion on all topics. What was the first topic we discussed? Only "
        "give me the topic name, without any summary."
    )
    return {"prompt": "\n".join(lines), "topics": chosen}


def read_cases(path: Path) -> list[dict[str, Any]]:
    """Cases of a JSON-lines file in LongChat's layout: objects with "prompt" and "topics" (the first is the answer)."""
    if not path.is_file():
        raise ValueError(f"cases must be an existing JSON-lines file, got {str(path)!r}")
    found = []
    # not splitlines(), which also ends lines where a text inside may hold a character
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            case = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
        named = case.get("topics") if isinstance(case, dict) else None
        if not (isinstance(named, list) and named and all(isinstance(t, str) and t for t in named)) or not isinstance(
            case.get("prompt"), str
        ):
            raise ValueError(f"{path}, line {number}: expected an object with prompt, a text, and topics, texts")
        found.append(case)
    if not found:
        raise ValueError(f"cases must hold at least one case, {path} is empty")
    return found


def is_right(label: str, prediction: str) -> bool:
    """The published rule: the label is part of the prediction, lower-cased and without []'" at its ends."""
    return label.lower() in prediction.lower().strip().strip("[]'\"")


def score_lines(lines: list[str]) -> float:
    """Accuracy of a published log: lines "Label: X, Predict: Y[, prompt length: n]"; others count as wrong."""
    right = 0
    for line in lines:
        parts = line.split(", Predict: ")
        if len(parts) == 2:
            label = parts[0].removeprefix("Label: ").lower()
            right += is_right(label, parts[1].split(", prompt length:")[0])
    return right / len(lines) if lines else 0.0


def run(
    evaluated: Evaluated,
    topics: list[int] | None = None,
    *,
    cases: int = 10,
    file: Path | None = None,
    seed: int = 0,
    new_tokens: int = NEW_TOKENS,
) -> dict[str, Any]:
    """Accuracy per number of topics; greedy, cut at a line end or at the next "USER:".

    topics: numbers of them in the conversations made here (default 5, 10, 15, 20, 25); those of a file have their own.
    """
    if topics is not None and file is not None:
        raise ValueError(f"topics must be left out with a file, whose cases have their own, got {topics}")
    _checks.integer("cases", cases, 1)
    _checks.integer("seed", seed, 0)
    groups: dict[int, list[dict[str, Any]]] = {}
    if file is not None:
        for case in read_cases(file):
            groups.setdefault(len(case["topics"]), []).append(case)
        groups = {n: some[:cases] for n, some in sorted(groups.items())}
    else:
        groups = {n: [make_case(n, seed, i) for i in range(cases)] for n in topics or TOPICS}
    tokenizer = evaluated.tokenizer
    rows, answers = [], []
    for count, some in groups.items():
        right, longest = 0, 0
        for case in progress(some, f"{count} topics"):
            ids = encode_prompt(tokenizer, case["prompt"] + QUESTION)
            longest = max(longest, len(ids))
            text = tokenizer.decode(continue_greedily(evaluated, ids, new_tokens), skip_special_tokens=True)
            for stop in STOPS:
                text = text.split(stop)[0]
            correct = is_right(case["topics"][0], text)
            right += correct
            answers.append({"topics": count, "label": case["topics"][0], "predict": text.strip(), "right": correct})
        rows.append(
            {**evaluated.describe(longest, seed), "topics": count, "cases": len(some), "accuracy": right / len(some)}
        )
    return {"task": "topics", "rows": rows, "answers": answers}
