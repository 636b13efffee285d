"""Ahead-of-time compilation: what the compiler says is read right and judged right; every kernel compiles.

Each test compiles in a process of its own: the interpreter, which other tests switch on, would compile nothing.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("triton.language")

from hici_kernels.aot import REQUIRED, fit, run


def compiler_process(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, timeout=600)


@pytest.fixture(scope="module")
def probe() -> dict:
    done = compiler_process(str(Path(__file__).with_name("aot_probe.py")))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("arch", REQUIRED)
def test_a_kernel_that_fits_is_reported_for_every_target(probe: dict, arch: str) -> None:
    found = probe["fits"][arch]
    assert found["verdict"] == "ok"
    assert found["registers"] > 16
    assert found["spill_bytes"] == 0
    assert 0 < found["shared_bytes"] < found["shared_limit"]
    matrix = {"sm_80": "mma.sync", "sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma", "gfx942": "v_mfma"}[arch]
    assert found["instructions"][matrix] > 0


def test_more_shared_memory_than_the_chip_has_fails_whatever_is_listed(probe: dict) -> None:
    found = probe["too large"]
    assert found["shared_bytes"] > found["shared_limit"]
    assert "shared memory" in found["verdict"]
    assert "shared memory" in found["excused"]


def test_spills_fail_unless_listed(probe: dict) -> None:
    found = probe["spills"]
    assert found["spill_bytes"] > 64
    assert "spill" in found["verdict"]
    assert found["excused"] == "listed exception"


def test_a_kernel_that_does_not_compile_fails_and_says_why(probe: dict) -> None:
    assert "power of 2" in probe["broken"]["verdict"]


def test_the_key_follows_the_configuration_and_the_source(probe: dict) -> None:
    assert probe["again"] == probe["fits"]["sm_80"]["key"]
    keys = [probe["other"], probe["again"], *(r["key"] for r in probe["fits"].values())]
    assert len(set(keys)) == len(REQUIRED) + 1
    assert len(set(probe["sources"])) == 2


def test_a_signature_that_forgets_a_parameter_is_refused(probe: dict) -> None:
    assert probe["refused"].endswith("look at out")


def test_launches_are_recorded_as_triton_would_specialise_them(probe: dict) -> None:
    found = probe["launched"]
    assert found["arch"] == "sm_80"
    sizes = {"SIZE": 64, "BLOCK": 32}
    types = {"a": "*bf16", "b": "*bf16"}
    # b begins 2 bytes after a multiple of 16, and 24 is no multiple of 16
    assert found["first"] == [types | {"out": "*fp32", "n": "i32"}, sizes, ["a", "out"], {"num_warps": 8}]
    assert found["second"] == [types, {"out": None, "n": 1, **sizes}, ["a", "b"], {}]


def test_a_listed_exception_is_no_licence_for_more() -> None:
    record = {"kernel": "k", "arch": "sm_80", "shared_bytes": 1, "shared_limit": 2, "spill_bytes": 100}
    rule = {"where": {"kernel": "k", "arch": "sm_80"}, "spill_bytes": 100, "cost": "none"}
    assert run.verdict(record, [rule]) == "listed exception"
    assert "spill" in run.verdict(record | {"spill_bytes": 104}, [rule])
    assert "spill" in run.verdict(record | {"arch": "sm_90"}, [rule])
    assert run.verdict(record | {"spill_bytes": 64}, []) == "ok"


def test_listed_exceptions_state_their_cost() -> None:
    for rule in json.loads(run.EXCEPTIONS.read_text(encoding="utf-8")):
        assert set(rule) == {"where", "spill_bytes", "cost"}
        assert rule["where"]["kernel"] and rule["where"]["arch"]
        assert len(rule["cost"]) > 20


def test_a_report_is_a_cache_of_what_compiled(tmp_path: Path) -> None:
    good = {"key": "a", "kernel": "k", "registers": 3, "spill_bytes": 0, "shared_bytes": 1, "shared_limit": 2}
    run.write(tmp_path / "report.json", [good, {"key": "b", "kernel": "k", "error": "no"}], "3.9.0")
    assert run.cached(tmp_path / "report.json") == {
        "a": {"registers": 3, "spill_bytes": 0, "shared_bytes": 1, "shared_limit": 2}
    }
    assert run.cached(tmp_path / "none.json") == {}


def test_an_interrupted_run_keeps_what_it_has_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fits = {"registers": 3, "spill_bytes": 0, "shared_bytes": 1, "shared_limit": 2}
    records = [{"key": k, "kernel": "k", "arch": "sm_90", "tables": []} for k in "abcd"]
    report = tmp_path / "report.json"
    run.write(report, [records[0] | fits, {"key": "past", "kernel": "k"} | fits], "3.9.0")

    def three_then_stop(plan: list, jobs: int) -> Iterator[dict]:
        assert plan == ["b", "c", "d"]
        yield fits
        assert run.cached(report).keys() == {"a", "past"}  # not after every kernel
        monkeypatch.setattr(run, "SAVE_SECONDS", 0.0)
        yield {"error": "no"}
        assert run.cached(report).keys() == {"a", "b", "past"}
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "require_compiler", lambda: None)
    monkeypatch.setattr(run, "tasks", lambda one: "abcd")
    monkeypatch.setattr(run, "distinct", lambda plan, version: (list(plan), [dict(r) for r in records]))
    monkeypatch.setattr(run, "_compile_all", three_then_stop)
    with pytest.raises(KeyboardInterrupt):
        run.run(report, 1, False, True)
    rows = {r["key"]: r for r in json.loads(report.read_text(encoding="utf-8"))["kernels"]}
    assert rows.keys() == {"a", "b", "c", "past"} and rows["b"]["verdict"] == "ok" and "no" in rows["c"]["verdict"]
    # the next run goes on from there; one of each kernel keeps what it has not looked at, a whole one leaves the past
    monkeypatch.setattr(run, "_compile_all", lambda plan, jobs: iter([fits] * len(plan)))
    run.run(report, 1, True, True)
    assert run.cached(report).keys() == {*"abcd", "past"}
    run.run(report, 1, False, True)
    assert run.cached(report).keys() == set("abcd")


def test_what_the_report_proves_is_not_compiled_again(tmp_path: Path) -> None:
    script, report = str(Path(__file__).with_name("aot_tree.py")), tmp_path / "report.json"
    first = compiler_process(script, str(report))
    assert first.returncode == 0, first.stdout + first.stderr
    rows = json.loads(report.read_text(encoding="utf-8"))["kernels"]
    assert {r["arch"] for r in rows} >= set(REQUIRED)
    assert f"{len(rows)} compiled now, 0 taken" in first.stdout
    text = report.read_text(encoding="utf-8")
    rows[0]["key"] = "changed"
    report.write_text(json.dumps({"kernels": rows}), encoding="utf-8")
    second = compiler_process(script, str(report))
    assert second.returncode == 0 and f"1 compiled now, {len(rows) - 1} taken" in second.stdout
    again = json.loads(report.read_text(encoding="utf-8"))["kernels"]
    strip = [{k: v for k, v in r.items() if k != "seconds"} for r in again]
    assert strip == [{k: v for k, v in r.items() if k != "seconds"} for r in json.loads(text)["kernels"]]


def test_a_required_architecture_without_configuration_is_a_failure() -> None:
    assert run.absent([{"kernel": "k", "arch": a} for a in REQUIRED[1:]]) == [
        f"k: its table has no entry for {REQUIRED[0]}"
    ]


def test_a_table_without_kernels_is_a_failure() -> None:
    assert run.unused([{"tables": ["a"]}], ["a", "b"]) == ["b: no kernel is launched for this table"]


COMMITTED = Path(__file__).parents[2] / "benchmarks" / "aot.json"


def test_the_committed_report_has_no_failure() -> None:
    report = json.loads(COMMITTED.read_text(encoding="utf-8"))
    exceptions = json.loads(run.EXCEPTIONS.read_text(encoding="utf-8"))
    assert report["kernels"]
    for record in report["kernels"]:
        assert record["verdict"] == run.verdict(record, exceptions), run.title(record)
        assert record["verdict"] in ("ok", "listed exception"), run.title(record)


@pytest.mark.parametrize("fresh", [None, pytest.param("sm_90", marks=pytest.mark.slow)])
def test_one_configuration_of_every_kernel_compiles_for_every_target(tmp_path: Path, fresh: str | None) -> None:
    """What the committed report proves is taken from it; of ``fresh``, everything is compiled, to the same result."""
    committed = json.loads(COMMITTED.read_text(encoding="utf-8"))
    committed["kernels"] = [r for r in committed["kernels"] if r["arch"] != fresh]
    report = tmp_path / "report.json"
    report.write_text(json.dumps(committed), encoding="utf-8")
    done = compiler_process("-m", "hici_kernels.aot", "--one-per-kernel", "--report", str(report))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    records = json.loads(report.read_text(encoding="utf-8"))["kernels"]
    compiled = {(r["kernel"], r["arch"]) for r in records}
    assert {a for _, a in compiled} >= set(REQUIRED)
    for kernel, _ in list(compiled):
        assert {a for k, a in compiled if k == kernel} >= set(REQUIRED)
    tables = {t for r in records for t in r["tables"]}
    assert {"attention", "attention_backward", "local_slots", "local_slots_backward", "global_stats"} <= tables
    if fresh is not None and committed["triton"] == triton_version():
        known = {r["key"]: r for r in json.loads(COMMITTED.read_text(encoding="utf-8"))["kernels"]}
        again = [r for r in records if r["arch"] == fresh]
        assert again
        for record in again:
            for name in set(run.RESULTS) - {"seconds"}:
                assert record.get(name) == known[record["key"]].get(name), (run.title(record), name)


@pytest.mark.slow
def test_the_committed_report_proves_every_entry_of_the_tables(tmp_path: Path) -> None:
    """Sources, tables and report belong together: nothing is left to compile, and nothing in it is of the past."""
    committed = json.loads(COMMITTED.read_text(encoding="utf-8"))
    if committed["triton"] != triton_version():
        pytest.skip(f"the committed report is of triton {committed['triton']}")
    report = tmp_path / "report.json"
    report.write_text(COMMITTED.read_text(encoding="utf-8"), encoding="utf-8")
    done = compiler_process("-m", "hici_kernels.aot", "--report", str(report))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert ", 0 compiled now" in done.stdout
    assert json.loads(report.read_text(encoding="utf-8")) == committed


def triton_version() -> str:
    done = compiler_process("-c", "import triton; print(triton.__version__)")
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_an_entry_that_is_too_large_is_made_to_fit() -> None:
    done = compiler_process(str(Path(__file__).with_name("aot_fit.py")))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["wrong"] == "" and found["verdicts"][-1] == "ok" and "shared memory" in found["verdicts"][0]
    # only stages had to go
    assert found["found"] == found["start"] | {"num_stages": found["found"]["num_stages"]}
    assert 1 < found["found"]["num_stages"] < found["start"]["num_stages"]
    assert found["why"].startswith("a guess; shrunk from SIZE=128 BLOCK=64") and "shared memory" in found["why"]
    assert set(found["variants"]) == {"own"}
    assert found["again"] == found["found"]


START = {"BLOCK_M": 128, "BLOCK_N": 64, "TMA": 1, "num_warps": 8, "num_stages": 3}


def test_candidates_begin_with_the_start_and_shrink() -> None:
    found = list(fit.candidates(START, "BLOCK_M"))
    assert found[0] == START
    assert all(c["TMA"] == 1 and c.keys() == START.keys() for c in found)
    assert len({tuple(c.items()) for c in found}) == len(found)
    assert all(fit.LEAST <= c[k] <= START[k] for c in found for k in ("BLOCK_M", "BLOCK_N"))
    assert all(1 <= c["num_stages"] <= 3 and c["num_warps"] in (4, 8) for c in found)
    # whole rows before anything with fewer, loads ahead before anything without
    cut = [c["num_stages"] == 1 or c["BLOCK_M"] < 64 for c in found]
    assert cut == sorted(cut)
    assert [c["num_stages"] == 1 for c in found] == sorted(c["num_stages"] == 1 for c in found)


@pytest.mark.parametrize(
    "why, change, expected",
    [
        ("100 bytes of spill", {"num_warps": 4}, True),
        ("100 bytes of spill", {"BLOCK_N": 32}, False),
        ("100 bytes of spill", {"num_stages": 2}, False),
        ("300000 bytes of shared memory", {"num_warps": 4}, True),
        ("300000 bytes of shared memory", {"num_stages": 2}, False),
        ("does not compile", {}, False),
    ],
)
def test_what_needs_no_less_than_a_failure_is_not_tried(why: str, change: dict, expected: bool) -> None:
    assert fit.hopeless(START | change, [(START, why)]) is expected


def test_the_interpreter_is_refused(tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "hici_kernels.aot"], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 2
    assert "TRITON_INTERPRET" in done.stderr
