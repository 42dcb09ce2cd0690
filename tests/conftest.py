"""Settings and fixtures of all tests. One torch thread: the models of the tests are so small that a second one costs
time."""

import pytest
import torch

from engram.tables import kernels

torch.set_num_threads(1)
kernels.set_threads(2)  # so that the kernels' own threads are tested on every machine


@pytest.fixture(params=["native", "torch"])
def path_of(request, monkeypatch):
    """Run a test once with the compiled kernels and once without."""
    if request.param == "torch":
        monkeypatch.setattr(kernels, "native", None)
    elif kernels.native is None:
        pytest.skip("engram is installed without compiled kernels")
    return request.param
