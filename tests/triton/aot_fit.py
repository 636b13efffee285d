"""Run by test_aot.py in a process of its own: an entry that is too large for its chip, made to fit, as JSON."""

import json

from aot_probe import product

from hici_kernels.aot import fit
from hici_kernels.tuning import AotSignature, Entry


def aot_signatures(entry: Entry) -> list[AotSignature]:
    arguments = {"a": "*bf16", "b": "*bf16", "out": "*fp32", "n": "i32"}

    def signature(variant: str, constexprs: dict[str, int]) -> AotSignature:
        return AotSignature(product, variant, arguments, constexprs, tuple(arguments))

    return [signature("own", entry.constexprs), signature("another table's", {"SIZE": 16, "BLOCK": 16})]


if __name__ == "__main__":
    fit.modules = lambda: ["aot_fit"]
    start = {"SIZE": 128, "BLOCK": 64, "num_warps": 8, "num_stages": 8}
    entry = Entry("probe", "sm_80", 128, 0, ("bfloat16",), start, why="a guess; shrunk from something larger")
    found, records, wrong = fit.fit(entry, {})
    fit.compile_signature = None  # everything is known now
    again, _, _ = fit.fit(entry, {r["key"]: r for r in records})
    print(
        json.dumps(
            {
                "start": start,
                "found": found.configuration,
                "why": found.why,
                "wrong": wrong,
                "variants": [r["variant"] for r in records],
                "verdicts": [r["verdict"] for r in records],
                "again": again.configuration,
            }
        )
    )
