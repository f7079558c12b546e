"""What every test starts from."""

import pytest
import torch

torch.set_num_threads(1)  # small tensors: more threads cost more than they give


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
