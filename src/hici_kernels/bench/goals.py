"""What the CPU kernels are to reach (suite "cpu"), beside what this run measured."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .. import _dispatch
from . import decode
from .case import FASTEST, PLAIN
from .global_stats import COPY, LARGE, REAL
from .hici_layer import CORE, WHOLE
from .local_slots import NARROW, WIDE

Row = dict[str, Any]


def goals(rows: list[Row], decoded: list[Row], ceilings: dict[str, Any]) -> list[dict[str, Any]]:
    """One entry per goal: text, value, needed, aim, verdict ("reached", "missed", "reported", "not measured"), note."""
    found = [*_attention(rows, ceilings), *_layer(rows), *_slots(rows), *_statistics(rows)]
    return [*found, *_decode(decoded)]


def _goal(
    text: str,
    value: float | None,
    unit: str,
    needed: float | None = None,
    aim: float | None = None,
    *,
    most: bool = False,
    note: str = "",
) -> dict[str, Any]:
    """most: ``value`` is to stay at or below ``needed``."""
    if value is None:
        verdict = "not measured"
    elif needed is None:
        verdict = "reported"
    else:
        verdict = "reached" if (value <= needed if most else value >= needed) else "missed"
    entry = {"goal": text, "value": value, "unit": unit, "needed": needed, "aim": aim, "at_most": most}
    return entry | {"verdict": verdict, "note": note}


def _attention(rows: list[Row], ceilings: dict[str, Any]) -> Iterable[dict[str, Any]]:
    for dtype, forward, backward, aim in (("bfloat16", 2.0, 2.5, 3.0), ("float32", 1.1, 1.15, None)):
        of = _rows(rows, "attention", dtype)
        row = _only(of, direction="forward")
        side = _judged(row)
        against = row["against"] if row else "SDPA"
        yield _goal(f"attention {dtype} forward, times {against}", _get(side, "speedup"), "x", forward, aim)
        burst, steady = _get(side, "product_share"), _get(side, "steady_share")
        share = steady or burst
        of_burst = "" if steady is None or burst is None else f"{100 * burst:.0f} % of the best 20 ms of the loop"
        if dtype == "float32":
            fma = None if ceilings.get("fma_flops") is None else share
            text = "attention float32 forward, share of the multiply-add rate"
            yield _goal(text, fma, "share", 0.65, note=of_burst)
        else:
            products = ceilings.get("bfloat16_products")
            tiles = share if products == "amx" else None
            note = "" if tiles is not None else "no AMX"
            if products and products != "amx" and share is not None:
                note += f"; {100 * share:.0f} % of the rate of {products} chains, {of_burst}".removesuffix(", ")
            text = "attention bfloat16 forward, share of resident AMX tile products"
            yield _goal(text, tiles, "share", 0.25, note=note)
        row = _only(of, direction="forward+backward")
        text = f"attention {dtype} forward+backward, times {against}"
        yield _goal(text, _get(_judged(row), "speedup"), "x", backward)


def _layer(rows: list[Row]) -> Iterable[dict[str, Any]]:
    row = _named(rows, CORE)
    side, other = _judged(row), (row or {"sides": {}})["sides"].get(PLAIN, {})
    yield _goal("layer, projections excluded, times the published sequence", _get(side, "speedup"), "x", 2.5)
    ours, theirs = _get(side, "resident_bytes"), other.get("resident_bytes")
    share = ours / theirs if ours is not None and theirs else None
    note = "" if share is None else f"{_mb(ours)} against {_mb(theirs)}, result included"
    yield _goal("layer, extra peak memory over the published sequence's", share, "share", 0.25, most=True, note=note)
    yield _goal(
        "layer with projections, times the published sequence", _get(_judged(_named(rows, WHOLE)), "speedup"), "x"
    )


def _slots(rows: list[Row]) -> Iterable[dict[str, Any]]:
    for name in (WIDE, NARROW):
        for dtype, needed, aim in (("float32", 5.0, None), ("bfloat16", 3.0, 4.0)):
            of = [r for r in _rows(rows, "local_slots", dtype) if r["case"] == name]
            text = f"slots {name} {dtype} %s, times two projections and SDPA"
            forward, both = (_get(_judged(_only(of, direction=d)), "speedup") for d in ("forward", "forward+backward"))
            yield _goal(text % "forward", forward, "x", needed, aim)
            yield _goal(text % "forward+backward", both, "x")


def _statistics(rows: list[Row]) -> Iterable[dict[str, Any]]:
    of = [r for r in rows if r["op"] == "global_stats" and r["direction"] == "forward"]
    for row in of:
        seconds = _get(_judged(row), "median_s")
        if row["case"] == LARGE:
            copy = row["sides"].get(COPY, {}).get("median_s")
            share = None if seconds is None or copy is None else copy / seconds
            yield _goal(f"statistics {row['dtype']} of 256 MiB, share of copy bandwidth", share, "share", 0.7)
        if row["case"] == REAL:
            kind = "causal" if row["shape"].endswith("causal") else "shared"
            micro = None if seconds is None else 1e6 * seconds
            yield _goal(f"statistics {row['dtype']} {kind}, {REAL}", micro, "us", 20.0, most=True)


def _decode(rows: list[Row]) -> Iterable[dict[str, Any]]:
    for slots in (True, False):
        of = [r for r in rows if r["slots"] == slots]
        timed = [r for r in of if "speedup" in r]
        text = f"decode-sized calls {'with' if slots else 'without'} slots, sizes slower than PyTorch"
        lost = float(len(decode.losses(timed))) if timed else None
        yield _goal(text, lost, f"of {len(of)}", 0.0, most=True)
    for row in decode.longest(rows):
        side = row["sides"][decode.OURS]
        theirs = row["sides"][decode.PLAIN]["bytes_per_s"] / 1e9
        share = side.get("read_share")
        note = f"{side['bytes_per_s'] / 1e9:.1f} GB/s, PyTorch {theirs:.1f} GB/s" if "bytes_per_s" in side else ""
        yield _goal(f"one query, share of read bandwidth: {decode.size_of(row)}", share, "share", note=note)


def _rows(rows: list[Row], op: str, dtype: str) -> list[Row]:
    return [r for r in rows if r["op"] == op and r["dtype"] == dtype]


def _only(rows: list[Row], direction: str) -> Row | None:
    return next((r for r in rows if r["direction"] == direction), None)


def _named(rows: list[Row], name: str) -> Row | None:
    return next((r for r in rows if r["op"] == "hici_layer" and r["case"].endswith(name)), None)


def _judged(row: Row | None) -> dict[str, Any] | None:
    """Our fastest side that is not the reference; None where there is none or its result was wrong."""
    if row is None:
        return None
    ours = (FASTEST, *(name for name in _dispatch.ORDER if name != "reference"))
    timed = [s for name in ours if "median_s" in (s := row["sides"].get(name, {}))]
    return min(timed, key=lambda s: s["median_s"], default=None)


def _get(side: dict[str, Any] | None, key: str) -> float | None:
    return None if side is None else side.get(key)


def _mb(size: float | None) -> str:
    return "-" if size is None else f"{size / 1e6:.0f} MB"
