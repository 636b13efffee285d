"""One kernel for one target: what the compiler says of it."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import re
import time
from typing import Any

from ..tuning import AotSignature, Entry, shared_memory
from .source import source_hash


def target_of(arch: str) -> Any:
    """Triton's target for an architecture name."""
    from triton.backends.compiler import GPUTarget

    if arch.startswith("sm_"):
        return GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    # CDNA works in wavefronts of 64, RDNA of 32
    return GPUTarget("hip", arch, 64 if arch.startswith("gfx9") else 32)


def options_of(signature: AotSignature, entry: Entry) -> dict[str, Any]:
    """Launch options. Fusion of multiply and add is named because Triton's default differs between versions."""
    return {"enable_fp_fusion": True, **entry.options, **(signature.options or {})}


def key_of(signature: AotSignature, entry: Entry, version: str) -> str:
    """Identity of a compilation: equal keys give equal code."""
    content = [
        source_hash(signature.kernel),
        entry.arch,
        signature.arguments,
        {k: str(v) for k, v in signature.constexprs.items()},
        sorted(signature.divisible),
        options_of(signature, entry),
        version,
    ]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def check(signature: AotSignature) -> None:
    """ValueError if arguments and constexprs together are not exactly the kernel's parameters."""
    names = list(signature.kernel.arg_names)
    given = [*signature.arguments, *signature.constexprs]
    wrong = sorted(set(names) ^ set(given)) + sorted(set(signature.divisible) - set(signature.arguments))
    if wrong or len(given) != len(set(given)):
        raise ValueError(
            f"aot signature of {name_of(signature)}: its arguments, constexprs and divisible must name each parameter "
            f"of the kernel once; look at {', '.join(wrong) or 'the doubled name'}"
        )


def name_of(signature: AotSignature) -> str:
    return str(signature.kernel.fn.__name__)


def source_of(signature: AotSignature) -> Any:
    """What ``triton.compile`` takes."""
    from triton.compiler import ASTSource

    names = list(signature.kernel.arg_names)
    types = {n: signature.arguments.get(n, "constexpr") for n in names}
    values = {(names.index(n),): v for n, v in signature.constexprs.items()}
    attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in signature.divisible}
    return ASTSource(signature.kernel, types, values, attributes)


def compile_one(signature: AotSignature, entry: Entry) -> dict[str, Any]:
    """Compile; registers, shared memory and spill bytes per thread, or the reason it does not compile."""
    import triton

    began = time.perf_counter()
    log = io.StringIO()
    try:
        with _assembler_report(log):
            compiled = triton.compile(
                source_of(signature), target=target_of(entry.arch), options=options_of(signature, entry)
            )
        usage = amd_usage(compiled.asm["amdgcn"]) if entry.arch.startswith("gfx") else nvidia_usage(log.getvalue())
        usage |= {"shared_bytes": int(compiled.metadata.shared), "instructions": matrix_instructions(compiled.asm)}
    except Exception as error:
        # whatever the compiler raises is this kernel's result; the others are still compiled
        usage = {"error": f"{type(error).__name__}: {str(error).strip()[:400]}"}
    return usage | {"shared_limit": shared_memory(entry.arch), "seconds": round(time.perf_counter() - began, 2)}


@contextlib.contextmanager
def _assembler_report(log: io.StringIO) -> Any:
    """Triton runs its assembler with -v anyway; let it print what it was told, and never take a cached binary."""
    from triton import knobs

    with knobs.nvidia.scope(), knobs.compilation.scope(), contextlib.redirect_stdout(log):
        knobs.nvidia.dump_ptxas_log = True
        knobs.compilation.always_compile = True
        yield


def nvidia_usage(log: str) -> dict[str, Any]:
    """Registers and spills from ``ptxas -v``; ValueError if it does not say."""
    registers = re.search(r"Used (\d+) registers", log)
    stores = re.search(r"(\d+) bytes spill stores", log)
    loads = re.search(r"(\d+) bytes spill loads", log)
    if registers is None or stores is None or loads is None:
        raise ValueError(f"the assembler reported no registers or spills: {log[:200]!r}")
    return {
        "registers": int(registers[1]),
        "spill_bytes": int(stores[1]),
        "spill_load_bytes": int(loads[1]),
    }


def amd_usage(text: str) -> dict[str, Any]:
    """Registers and spills from the metadata in the assembly; ValueError if it does not say."""
    found = {k: re.search(rf"\.{k}:\s*(\d+)", text) for k in ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count")}
    missing = [k for k, m in found.items() if m is None]
    if missing:
        raise ValueError(f"the assembly names no {', '.join(missing)}")
    value = {k: int(m[1]) for k, m in found.items() if m is not None}
    # a spilled vector register is 4 bytes per lane; a spilled scalar register goes into lanes of a vector register
    return {
        "registers": value["vgpr_count"],
        "spill_bytes": 4 * value["vgpr_spill_count"],
        "spilled_scalars": value["sgpr_spill_count"],
    }


def matrix_instructions(asm: dict[str, Any]) -> dict[str, int]:
    """How often the code names the instructions that decide its speed; absent ones are left out."""
    text = str(asm.get("ptx") or asm.get("amdgcn") or "")
    names = (
        ("wgmma.mma_async", "tcgen05.mma", "mma.sync", "cp.async.bulk.tensor", "cp.async.cg")
        if "ptx" in asm
        else ("v_mfma", "v_wmma", "buffer_load", "global_load")
    )
    return {n: text.count(n) for n in names if n in text}
