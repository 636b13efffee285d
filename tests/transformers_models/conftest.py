"""Skips this folder where transformers is missing; lets its tests import their helper; one thread: models are tiny."""

import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent))
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
