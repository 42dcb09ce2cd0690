"""Settings and fixtures of all tests. One torch thread: the models of the tests are so small that a second one costs
time."""

import os

# Before NumPy and torch are imported, here and in the processes that tests start: threads of OpenMP and BLAS wait for
# work in a loop, and two workers on two cores take each other's time. The kernels' threads sleep instead.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("ENGRAM_THREADS", "2")

import forks
import pytest
import torch

from engram.tables import kernels

torch.set_num_threads(1)
kernels.set_threads(2)  # so that the kernels' own threads are tested on every machine


@pytest.fixture(scope="session")
def forked():
    """forked(code, *arguments) -> CompletedProcess of a process that is there at once; see forks.Forks."""
    with forks.served() as call:
        yield call


@pytest.fixture(params=["native", "torch"])
def path_of(request, monkeypatch):
    """Run a test once with the compiled kernels and once without."""
    if request.param == "torch":
        monkeypatch.setattr(kernels, "native", None)
    elif kernels.native is None:
        pytest.skip("engram is installed without compiled kernels")
    return request.param
