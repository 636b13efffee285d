"""Every test of this folder needs the native library, and leaves the number of threads as it found it."""

import pytest
import torch

from hici_kernels import _native


@pytest.fixture(autouse=True)
def native_library():
    if _native.status() is not None:
        pytest.skip(str(_native.status()))
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
