"""Lets the tests of this folder import its helpers under any import mode, on one thread: they are tiny operations.

``on``: every implementation in turn (sides.py).
"""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from sides import SIDES, Side, missing


@pytest.fixture(scope="module", params=SIDES, ids=[side.impl for side in SIDES])
def on(request: pytest.FixtureRequest) -> Side:
    side: Side = request.param
    reason = missing(side)
    if reason:
        pytest.skip(f"{side.impl}: {reason}")
    return side


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
