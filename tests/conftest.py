"""conftest.py -- what do all tests share? A seed, and one thread: their tensors are small."""
import pytest
import torch

torch.set_num_threads(1)    # with more, tiny products wait for each other longer than they compute


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
