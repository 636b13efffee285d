"""Options, markers and the determinism every test relies on."""

from pathlib import Path

import hypothesis
import pytest
import torch

# a failure is the same on every machine; --hypothesis-profile=random looks further
hypothesis.settings.register_profile("random")
hypothesis.settings.register_profile("fixed", derandomize=True)
hypothesis.settings.load_profile("fixed")


def pytest_addoption(parser):
    parser.addoption(
        "--golden-dir",
        type=Path,
        default=Path(__file__).parent / "golden" / "data",
        help="directory of manifest_*.json and the reference fixtures they name",
    )
    parser.addoption(
        "--wheel",
        type=Path,
        help="a wheel of this tree for the packaging tests, which build one otherwise",
    )


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes more than a few seconds")


@pytest.fixture(autouse=True, scope="session")
def fixed_threads_and_seed():
    torch.set_num_threads(2)
    torch.manual_seed(0)
