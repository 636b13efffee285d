"""Run by test_aot.py in a process of its own: the whole command, for a file of kernels that is not in the package."""

import sys
from pathlib import Path

from aot_probe import product

from hici_kernels import tuning
from hici_kernels.aot import plan, run
from hici_kernels.tuning import AotSignature, Entry


def aot_signatures(entry: Entry) -> list[AotSignature]:
    if entry.op != "global_stats":
        return []
    return [
        AotSignature(
            kernel=product,
            variant="probe",
            arguments={"a": "*bf16", "b": "*bf16", "out": "*fp32", "n": "i32"},
            constexprs={"SIZE": 64, "BLOCK": 32},
            divisible=("a", "b", "out", "n"),
        )
    ]


if __name__ == "__main__":
    plan.modules = lambda: ["aot_tree"]
    tuning.tables = lambda: ["global_stats"]
    sys.exit(run.run(Path(sys.argv[1]), 1, False, True))
