"""Wrong calls name the argument that is wrong, what it was and what was expected; nothing else escapes."""

import importlib.util
import sys
from pathlib import Path

import pytest

_spec = importlib.util.spec_from_file_location("bad_input_collect", Path(__file__).with_name("collect.py"))
collect = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = collect
_spec.loader.exec_module(collect)

CASES = collect.all_cases()


@pytest.mark.parametrize("call, exception, message", [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_wrong_call(call, exception, message):
    assert issubclass(exception, (ValueError, TypeError)) and not issubclass(exception, RuntimeError)
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        call()
    assert isinstance(caught.value, exception)


def test_ids_are_unique_and_many():
    names = [c[0] for c in CASES]
    assert len(names) == len(set(names)) and len(names) >= 40


def test_the_table_is_current():
    assert collect.TABLE.exists(), "run python tests/bad_input/write_table.py"
    present = collect.table().splitlines()
    written = collect.TABLE.read_text(encoding="utf-8").splitlines()
    different = [f"{a}\n{b}" for a, b in zip(written, present, strict=False) if a != b]
    assert written == present, "run python tests/bad_input/write_table.py:\n" + "\n".join(different)
