"""The small models of the integrations' tests, on one thread."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "transformers_models"))


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory):
    """A small model and its tokenizer."""
    pytest.importorskip("transformers")
    from test_chat_and_cli import save_tokenizer
    from tiny_models import tiny

    directory = tmp_path_factory.mktemp("base")
    tiny().save_pretrained(directory)
    save_tokenizer(directory)
    return directory
