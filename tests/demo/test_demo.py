"""`hici demo`: runs end to end, counts what it says it counts, and reads text the model never saw."""

from __future__ import annotations

import dataclasses
import json
import sysconfig
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import pytest
import torch

from hici_kernels import HGAConfig, Rope
from hici_kernels.demo import counting, text
from hici_kernels.demo.hga_part import (
    BUDGETS,
    FULL_LIMIT,
    context_gains,
    last_step,
    read_all_dense,
    read_dense,
    read_routed,
    read_windows,
    work_of,
)
from hici_kernels.demo.lm import ByteLM
from hici_kernels.demo.run import CONTEXT_RANGE, CONTEXTS, run
from hici_kernels.ops.hga_attention import hga_attention
from hici_kernels.ops.hga_route import hga_route
from hici_kernels.ops.hga_summaries import hga_summaries

DATA = resources.files("hici_kernels.demo").joinpath("data")
PNG = b"\x89PNG\r\n\x1a\n"
PACKAGES = ("asyncio", "concurrent", "http", "json", "logging")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Several test processes on few cores would otherwise wait for one another in every parallel loop."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path, dict]:
    """Exit code, folder and numbers of one quick run."""
    out = tmp_path_factory.mktemp("demo")
    code = run(out=out, quick=True)
    return code, out, json.loads((out / "demo.json").read_text(encoding="utf-8"))


def test_quick_run_passes_its_own_checks(quick: tuple[int, Path, dict]) -> None:
    code, _, body = quick
    assert code == 0
    assert body["full_budget"]["attention_difference"] <= FULL_LIMIT
    assert body["full_budget"]["nats_difference"] <= FULL_LIMIT
    assert all(op["error"] <= op["allowed"] for op in body["hici"])
    assert [op["op"] for op in body["hici"]] == ["local_slots", "global_stats", "attention"]


def test_quick_run_numbers_are_sane(quick: tuple[int, Path, dict]) -> None:
    rows = quick[2]["hga"]
    assert [r["attention"] for r in rows] == ["dense", "quarter"]
    for row in rows:
        assert row["context"] == CONTEXTS[0]
        assert 0 < row["density"] <= 1
        assert 0 < row["loss"] < 5.55  # ln 256: worse than knowing nothing
        assert row["seconds"] > 0
        assert row["step"] > 0
    dense, routed = rows
    assert dense["gap"] == 0
    assert dense["density"] == 1
    assert routed["gap"] == pytest.approx(routed["loss"] - dense["loss"], abs=1e-5)
    assert routed["density"] < 0.5
    assert routed["step"] == pytest.approx(sum(routed["step_parts"].values()))
    assert routed["step"] < dense["step"]


def test_quick_run_writes_pictures(quick: tuple[int, Path, dict]) -> None:
    pytest.importorskip("matplotlib")
    for name in ("nats_vs_density.png", "opened_chunks.png"):
        body = (quick[1] / name).read_bytes()
        assert body.startswith(PNG)
        assert len(body) > 10_000


def test_dense_loss_is_the_models_own(quick: tuple[int, Path, dict]) -> None:
    body = quick[2]
    model = ByteLM.load()
    window = body["text"]["windows"][0]
    streams = text.held_out_streams(model.record["data"]["held_out"])
    source = next(s for s in streams if s.name == window["source"])
    piece = source.data[window["start"] : window["start"] + CONTEXTS[0]]
    with torch.no_grad():
        nll = model.nll(torch.tensor(list(piece))[None])[0]
    dense = body["hga"][0]
    assert dense["loss"] == pytest.approx(float(nll[-body["target_bytes"] :].double().mean()), abs=1e-5)
    assert dense["loss_all"] == pytest.approx(float(nll.double().mean()), abs=1e-5)


def test_targets_are_the_same_bytes_at_every_context() -> None:
    model = ByteLM().eval()
    (window,) = text.windows([text.Stream("t", bytes(range(256)) * 8, ("t",))], 2048, 1)
    long, short = window.ids, window.ids[:, -1024:]
    assert torch.equal(long[:, -512:], short[:, -512:])
    with torch.no_grad():
        assert torch.equal(read_dense(model, short).nll, model.nll(short)[0])


# -- the text -----------------------------------------------------------------------------------------------------


def test_held_out_text_is_not_in_the_training_data() -> None:
    record = ByteLM.load().record["data"]
    assert tuple(record["held_out"]) == PACKAGES
    files = [f for s in text.held_out_streams(record["held_out"]) for f in s.files]
    assert files
    # Training excludes whole groups, by top-level name: a file of the demo must lie in one of them.
    assert {Path(f).parts[0].removesuffix(".py") for f in files} <= set(record["held_out"])
    trained = _training_files()
    if trained is not None:
        assert not set(files) & trained


def _training_files() -> set[str] | None:
    """What the training script reads, where the source tree is at hand."""
    import importlib.util

    pytest.importorskip("numpy")
    script = Path(__file__).parents[2] / "benchmarks" / "quality" / "train_demo_lm.py"
    if not script.is_file():
        return None
    try:
        spec = importlib.util.spec_from_file_location("train_demo_lm", script)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError:
        return None
    root = Path(sysconfig.get_path("stdlib"))
    return {name for name, _ in module.library_files(root) if module.group_of(name) not in module.HELD_OUT}


def test_windows_are_spread_by_a_fixed_rule() -> None:
    streams = [text.Stream("a", bytes(1000), ("a",)), text.Stream("b", bytes(500), ("b",))]
    found = text.windows(streams, 400, 5)
    assert [(w.source, w.start) for w in found] == [("a", 300), ("b", 50), ("a", 150), ("b", 25), ("a", 450)]
    assert [w.start for w in text.windows(streams, 400, 3)] == [300, 50, 150]
    assert all(w.ids.shape == (1, 400) and w.ids.dtype == torch.int64 for w in found)
    assert len(text.windows([text.Stream("c", bytes(400), ("c",))], 400, 5)) == 1


# -- the counts ---------------------------------------------------------------------------------------------------

TINY = HGAConfig(chunk_size=8, group_size=4, keep_first=1, keep_last=2, topk_chunks=2, topk_groups=3)


def _tiny(length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Rope]:
    generator = torch.Generator().manual_seed(length)
    q, k, v = (torch.randn(1, length, h, 8, generator=generator) for h in (4, 2, 2))
    return q, k, v, Rope.from_theta(1e4, 8)


def _seen(routes: torch.Tensor, config: HGAConfig, p: int, head: int) -> set[int]:
    """Tokens that query p of a head reads, by the words of the rule."""
    c, g = config.chunk_size, config.group_size
    n = p // c
    tokens = set(range(n * c, p + 1))
    for chunk in range(n):
        if chunk < config.keep_first or n - chunk <= config.keep_last:
            tokens |= set(range(chunk * c, (chunk + 1) * c))
    for group in routes[0, p, head].tolist():
        if group >= 0:
            tokens |= set(range(group * g, (group + 1) * g))
    return tokens


CONFIGS = [
    TINY,
    dataclasses.replace(TINY, keep_first=0, keep_last=1),
    dataclasses.replace(TINY, topk_chunks=3, topk_groups=6),
    dataclasses.replace(TINY, topk_chunks=0, topk_groups=0),
]


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("length", [5, 8, 40, 61, 64])
def test_pair_count_is_what_ran(config: HGAConfig, length: int) -> None:
    q, k, v, rope = _tiny(length)
    result = hga_attention(q, k, v, config, rope=rope, return_routes=True)
    seen = torch.zeros(4, length, length, dtype=torch.bool)
    for head in range(4):
        for p in range(length):
            seen[head, p, sorted(_seen(result.routes, config, p, head))] = True
    count = counting.count_pairs(result.routes, config)
    assert count.seen == int(seen.sum())
    assert count.causal == 4 * length * (length + 1) // 2
    # the counted pairs are the computed ones: masking dense attention by them gives the same output
    dense = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=seen[None], enable_gqa=True
    )
    torch.testing.assert_close(result.out, dense.transpose(1, 2), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("length", [5, 8, 40, 61, 64])
def test_step_bytes_are_the_distinct_rows_read(config: HGAConfig, length: int) -> None:
    q, k, v, rope = _tiny(length)
    routes = hga_attention(q, k, v, config, rope=rope, return_routes=True).routes
    row = 8 * 4  # one key or value of a head: 8 float32
    tokens = {(head // 2, t) for head in range(4) for t in _seen(routes, config, length - 1, head)}
    n = (length - 1) // config.chunk_size
    pool = [c for c in range(n) if c >= config.keep_first and n - c > config.keep_last]
    scan = groups = 0
    if config.topk_chunks and pool:
        scan = len(pool) * 2 * row
        chunk_keys, _ = hga_summaries(k[:, : n * 8], rope=rope, chunk_size=8, group_size=4)
        picked = set()
        for head in range(4):
            score = {c: float(q[0, -1, head] @ chunk_keys[0, c, head // 2]) for c in pool}
            best = sorted(pool, key=lambda c: (-score[c], c))[: config.topk_chunks]
            picked |= {(head // 2, c) for c in best}
        groups = len(picked) * 2 * row
    found = last_step(q[:, -1:], k, routes[:, -1:], config, rope)
    assert found.scan == scan
    assert found.groups == groups
    assert found.opened + found.windows == len(tokens) * 2 * row
    assert found.total == scan + groups + len(tokens) * 2 * row
    whole = counting.dense_step_bytes(length=length, kv_heads=2, head_dim=8, itemsize=4)
    assert whole == 2 * length * 2 * row


def test_routed_reading_sums_over_layers_and_heads() -> None:
    model = ByteLM().eval()
    config = HGAConfig(chunk_size=16, group_size=4, keep_first=1, keep_last=1, topk_chunks=1, topk_groups=2)
    ids = torch.randint(0, 256, (1, 100), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        reading = read_routed(model, ids, config)
    assert reading.pairs is not None
    assert reading.pairs.causal == 5 * 4 * 100 * 101 // 2
    assert 0 < reading.pairs.density < 1
    assert len(reading.routes) == 5


def test_budgets_choose_at_both_levels() -> None:
    for budget in BUDGETS:
        c = budget.config
        assert c.topk_groups < c.topk_chunks * c.groups_per_chunk or not c.topk_groups
    assert next(b.config for b in BUDGETS if b.name == "default") == HGAConfig()


def test_route_lists_all_groups_of_the_picked_chunks() -> None:
    """What the count of group keys rests on."""
    q, k, _, rope = _tiny(64)
    chunk_keys, group_keys = hga_summaries(k[:, :56], rope=rope, chunk_size=8, group_size=4)
    every = dataclasses.replace(TINY, topk_groups=TINY.topk_chunks * 2)
    at = torch.full((1, 1), 63)
    few = hga_route(q[:, -1:], chunk_keys, group_keys, TINY, positions=at)
    many = hga_route(q[:, -1:], chunk_keys, group_keys, every, positions=at)
    for head in range(4):
        mine, all_of = set(few[0, 0, head].tolist()) - {-1}, set(many[0, 0, head].tolist())
        assert mine < all_of
        assert len({g // 2 for g in all_of}) == TINY.topk_chunks
        assert all(g ^ 1 in all_of for g in all_of)


def test_picture_shows_the_share_of_groups_opened() -> None:
    charts = pytest.importorskip("hici_kernels.demo.charts")
    q, k, v, rope = _tiny(64)
    routes = hga_attention(q, k, v, TINY, rope=rope, return_routes=True).routes[0]
    shares = charts.opened_share(routes, TINY)
    expected = torch.zeros(4, 8, 8)
    for p in range(64):
        for head in range(4):
            for group in routes[p, head].tolist():
                if group >= 0:
                    expected[head, p // 8, group // 2] += 1 / (8 * 2)
    torch.testing.assert_close(shares, expected)
    positional = sum(torch.eye(32).roll(d, 0).tril() * d / 32 for d in range(9, 32))
    by_content = torch.zeros(32, 32)
    by_content[:, 3] = 1
    layer, head, _ = charts.pick_picture([torch.stack([positional] * 2), torch.stack([positional, by_content.tril()])])
    assert (layer, head) == (1, 1)


# -- the shipped model --------------------------------------------------------------------------------------------


def test_shipped_weights_are_small() -> None:
    assert len(DATA.joinpath("byte_lm.safetensors").read_bytes()) <= 6_000_000


def test_model_uses_long_context() -> None:
    paired = ByteLM.load().record["evaluation"]["paired"]
    assert (paired["short_context"], paired["long_context"]) == (1024, 8192)
    assert paired["gap"]["mean"] >= 0.02


# -- bad input ----------------------------------------------------------------------------------------------------


def _bad(tmp_path: Path, case: str) -> dict:
    short = tmp_path / "short.txt"
    short.write_text("too short", encoding="utf-8")
    medium = tmp_path / "medium.txt"
    medium.write_bytes(bytes(3000))
    return {
        "missing": {"text": tmp_path / "nowhere.txt"},
        "folder": {"text": tmp_path},
        "short": {"text": short},
        "shorter than the context": {"text": medium, "context": 4096},
        "context too small": {"context": CONTEXT_RANGE[0] - 1},
        "context zero": {"context": 0},
        "context negative": {"context": -2048},
        "context too large": {"context": CONTEXT_RANGE[1] + 1},
        "out is a file": {"out": short},
        "json is a folder": {"json_path": tmp_path},
    }[case]


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("missing", "text must be an existing file"),
        ("folder", "text must be a file"),
        ("short", "text must hold at least 2,048 bytes, got 9"),
        ("shorter than the context", "text must hold at least 4,096 bytes, got 3,000"),
        ("context too small", "context must be between 1024 and 16384"),
        ("context zero", "context must be between"),
        ("context negative", "context must be between"),
        ("context too large", "got 16385"),
        ("out is a file", "out must be one that can be made"),
        ("json is a folder", "json must be a file"),
    ],
)
def test_bad_input_is_one_line(tmp_path: Path, case: str, words: str) -> None:
    arguments = {"out": tmp_path / "out", **_bad(tmp_path, case)}
    with pytest.raises(ValueError, match=words) as caught:
        run(**arguments)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_without_matplotlib_one_line_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from rich.console import Console

    from hici_kernels.demo import run as module

    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    plan = module._plan(ByteLM.load(), None, None, True)
    assert module._pictures(Console(width=100), plan, [], [], tmp_path) == []
    assert "hici-kernels[charts]" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_command_line_gives_one_line_and_code_2(tmp_path: Path) -> None:
    testing = pytest.importorskip("typer.testing")
    from hici_kernels.cli.main import app

    for arguments in (["--text", str(tmp_path / "nowhere.txt")], ["--context", "7"]):
        result = testing.CliRunner().invoke(app, ["demo", "--out", str(tmp_path / "out"), *arguments])
        assert result.exit_code == 2
        assert len(result.output.strip().splitlines()) == 1


def test_a_slow_machine_leaves_budgets_out_but_reads_dense() -> None:
    model = ByteLM().eval()
    streams = [text.Stream("t", bytes(range(256)) * 4, ("t",))]
    texts = text.windows(streams, 512, 3)
    done: list[float] = []
    with torch.no_grad():
        dense = read_all_dense(model, texts, (256, 512), seconds=0.0, advance=lambda what, work: done.append(work))
        assert len(dense) == 1
        rows, kept = read_windows(
            model,
            texts,
            dense,
            BUDGETS[:1],
            targets=128,
            seconds=0.0,
            advance=lambda what, work: None,
            keep=(256, BUDGETS[0].name),
        )
    assert [(r.context, r.attention, r.windows) for r in rows] == [(256, "dense", 1), (512, "dense", 1)]
    assert kept == []
    assert sum(done) == pytest.approx(work_of(1, (256, 512), 0))


def test_rows_are_means_over_the_same_windows() -> None:
    model = ByteLM().eval()
    streams = [text.Stream("t", bytes(range(251)) * 5, ("t",))]
    texts = text.windows(streams, 512, 2)
    with torch.no_grad():
        dense = read_all_dense(model, texts, (256, 512), seconds=1e9, advance=lambda what, work: None)
        rows, _ = read_windows(
            model, texts, dense, BUDGETS[:1], targets=128, seconds=1e9, advance=lambda what, work: None
        )
        expected = torch.stack([model.nll(w.ids)[0, -128:] for w in texts]).double().mean()
    assert [r.windows for r in rows] == [2] * 4
    long = next(r for r in rows if r.context == 512 and r.attention == "dense")
    assert long.loss == pytest.approx(float(expected), abs=1e-5)
    short, longer = context_gains(dense, 128)
    assert (short.context, short.gain) == (256, 0.0)
    assert longer.loss == pytest.approx(long.loss)
    assert longer.gain == pytest.approx(short.loss - longer.loss, abs=1e-9)


def test_text_file_is_read_at_the_contexts_it_fills(tmp_path: Path) -> None:
    from hici_kernels.demo.run import _plan

    model = ByteLM.load()
    file = tmp_path / "mine.txt"
    file.write_bytes(b"All work and no play. " * 400)  # 8,800 bytes
    plan = _plan(model, file, None, False)
    assert plan.contexts == (2048, 8192)
    assert {w.source for w in plan.texts} == {"mine.txt"}
    assert _plan(model, file, 4096, False).contexts == (4096,)
