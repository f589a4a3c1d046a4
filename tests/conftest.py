"""For all tests, which need a CPU and no network. LLMBLOCK_DATA=DIR adds those of real data."""

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that a test starts
torch.set_num_threads(1)  # more would only wait for each other


@pytest.fixture
def real():
    """The directory of real data."""
    if "LLMBLOCK_DATA" not in os.environ:
        pytest.skip("LLMBLOCK_DATA is not set")
    return Path(os.environ["LLMBLOCK_DATA"])
