"""The tables: what they hold, and which entry serves a call."""

from pathlib import Path

import pytest
import torch

from hici_kernels import tuning
from hici_kernels.tuning import chips, lookup
from hici_kernels.tuning.table import NOT_MEASURED, Entry

OPS = ("attention", "attention_backward", "local_slots", "local_slots_backward", "global_stats")
ARCHS = ("sm_80", "sm_86", "sm_90", "sm_100", "gfx942", "interpret")


def find(op: str, arch: str, head_dim: int = 128, segment_len: int = 4096, dtype: object = torch.bfloat16) -> Entry:
    return lookup.entry_for(op, arch, head_dim, segment_len, str(dtype).removeprefix("torch."))


@pytest.mark.parametrize("op", OPS)
def test_every_table_serves_every_architecture_and_dtype(op: str) -> None:
    for arch in ARCHS:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            entry = find(op, arch, dtype=dtype)
            assert entry.arch == arch
            assert str(dtype).removeprefix("torch.") in entry.dtypes
            found = tuning.configuration(op, arch, head_dim=128, segment_len=4096, dtype=dtype)
            assert found == entry.configuration
            assert found["num_warps"] in (1, 2, 4, 8) and 1 <= found["num_stages"] <= 5


@pytest.mark.parametrize("op", tuning.tables())
def test_every_entry_says_where_its_values_come_from(op: str) -> None:
    keys = []
    for e in tuning.read(op):
        assert e.why
        keys.append((e.arch, e.head_dim, e.segment_len, e.dtypes))
        if e.measured != NOT_MEASURED:
            assert {"gpu", "when", "median_us"} <= set(e.measured)
    assert len(set(keys)) == len(keys)


def test_callers_get_their_own_copy() -> None:
    first = tuning.configuration("attention", "sm_90", head_dim=128, segment_len=4096, dtype=torch.bfloat16)
    first["BLOCK_M"] = -1
    again = tuning.configuration("attention", "sm_90", head_dim=128, segment_len=4096, dtype=torch.bfloat16)
    assert again["BLOCK_M"] != -1


@pytest.mark.parametrize(
    ("arch", "expected"),
    [
        ("sm_103", "sm_100"),  # as much shared memory: the newest of those that are not newer
        ("sm_120", "sm_86"),  # newer than all, but with the shared memory of sm_86
        ("sm_89", "sm_86"),
        ("sm_87", "sm_80"),
        ("sm_75", "sm_86"),  # less than any in the table: the one with least
        ("gfx950", "gfx942"),
        ("gfx1100", "gfx942"),
    ],
)
def test_rule_1_an_unknown_chip_takes_what_fits_it(arch: str, expected: str) -> None:
    assert lookup.nearest_arch(arch, frozenset(ARCHS)) == expected


def test_rule_1_never_takes_another_vendors_chip() -> None:
    with pytest.raises(ValueError, match="gfx942"):
        lookup.nearest_arch("gfx942", frozenset({"sm_90"}))
    with pytest.raises(ValueError, match="'tpu'"):
        lookup.nearest_arch("tpu", frozenset({"sm_90"}))


def rows(monkeypatch: pytest.MonkeyPatch, *entries: tuple[int, int, tuple[str, ...]]) -> None:
    table = tuple(Entry("t", "sm_90", d, s, t, {"ID": i}) for i, (d, s, t) in enumerate(entries))
    monkeypatch.setattr(lookup, "read", lambda op: table)
    lookup.entry_for.cache_clear()
    monkeypatch.setattr(lookup, "entry_for", lookup.entry_for.__wrapped__)


def chosen(head_dim: int, segment_len: int, dtype: torch.dtype) -> int:
    return lookup.configuration("t", "sm_90", head_dim=head_dim, segment_len=segment_len, dtype=dtype)["ID"]


def test_rule_2_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    rows(monkeypatch, (128, 1024, ("bfloat16",)), (128, 1024, ("float32",)))
    assert chosen(128, 1024, torch.bfloat16) == 0
    assert chosen(128, 1024, torch.float16) == 0  # same width
    assert chosen(128, 1024, torch.float32) == 1
    assert chosen(128, 1024, torch.float64) == 1  # the widest


def test_rule_3_head_dim(monkeypatch: pytest.MonkeyPatch) -> None:
    rows(monkeypatch, (64, 1024, ("bfloat16",)), (128, 1024, ("bfloat16",)))
    assert [chosen(d, 1024, torch.bfloat16) for d in (16, 64, 65, 128, 256)] == [0, 0, 1, 1, 1]


def test_rule_4_segment_len(monkeypatch: pytest.MonkeyPatch) -> None:
    rows(monkeypatch, (128, 1024, ("bfloat16",)), (128, 4096, ("bfloat16",)))
    assert [chosen(128, s, torch.bfloat16) for s in (1, 1500, 2048, 2100, 1 << 20)] == [0, 0, 0, 1, 1]
    assert chosen(128, 0, torch.bfloat16) == 1  # the whole sequence


def test_an_unknown_table_is_named_beside_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"attention.*'nothing'"):
        tuning.configuration("nothing", "sm_90", head_dim=128, segment_len=1, dtype=torch.bfloat16)


def test_a_table_survives_writing(tmp_path: Path) -> None:
    entries = list(tuning.read("attention"))
    path = tuning.write("attention", entries, tmp_path)
    assert path.read_text() == (Path(tuning.__file__).parent / "tables" / "attention.json").read_text()
    assert [p.name for p in tmp_path.iterdir()] == ["attention.json"]


def test_a_cpu_tensor_can_only_meet_the_interpreter() -> None:
    assert tuning.architecture(torch.device("cpu")) == "interpret"


def test_shared_memory_of_an_unknown_chip_is_the_least_a_vendor_ships() -> None:
    assert chips.shared_memory("sm_999") == min(chips.SHARED_MEMORY.values())
