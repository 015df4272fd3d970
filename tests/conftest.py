"""conftest.py -- what do all tests share? A seed, and one thread: their tensors are small."""
import os
import random

import checkpoint  # noqa: F401 (before torch: it says how torch's threads wait)

import pytest
import torch

torch.set_num_threads(1)    # with more, tiny products wait for each other longer than they compute
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")      # Triton reads it once, when kernels.py does


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def pytest_addoption(parser):
    parser.addoption("--shuffle", type=int, help="seed of a random order of the tests")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--shuffle") is not None:
        random.Random(config.getoption("--shuffle")).shuffle(items)
