"""Shared by test files. One torch thread: the models of the tests are so small that a second one only costs."""

import pytest
import torch

from engram.tables import kernels

torch.set_num_threads(1)
kernels.set_threads(2)  # theirs are tested on every machine


@pytest.fixture(params=["native", "torch"])
def path_of(request, monkeypatch):
    """Runs a test once with the compiled kernels and once without."""
    if request.param == "torch":
        monkeypatch.setattr(kernels, "native", None)
    elif kernels.native is None:
        pytest.skip("no compiled kernels here")
    return request.param
