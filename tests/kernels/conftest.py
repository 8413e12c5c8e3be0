import os
from collections.abc import Iterator

import pytest
import torch

from adapt_pruner.kernels import backend_status


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """New tensors are born full of NaN (or the largest integer): an output that is not written shows."""
    torch.manual_seed(0)
    torch.set_deterministic_debug_mode("error")
    assert torch.empty(1).isnan().all()
    yield
    torch.set_deterministic_debug_mode("default")


@pytest.fixture
def native_cpu() -> str:
    """The native CPU backend; a test session without it is a failure, unless it was left out on purpose."""
    problem = backend_status()["cpu"]
    if problem is not None and os.environ.get("ADAPT_PRUNER_NO_EXT") == "1":
        pytest.skip(problem)
    assert problem is None, problem
    return "cpu"


@pytest.fixture
def threads() -> Iterator[None]:
    """Restores the number of threads after a test that changes it."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
