"""Options, markers and the determinism every test relies on."""

from pathlib import Path

import pytest
import torch


def pytest_addoption(parser):
    parser.addoption(
        "--golden-dir",
        type=Path,
        default=Path(__file__).parent / "golden" / "data",
        help="directory of manifest_*.json and the reference fixtures they name",
    )


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes more than a few seconds")


@pytest.fixture(autouse=True, scope="session")
def fixed_threads_and_seed():
    torch.set_num_threads(2)
    torch.manual_seed(0)
