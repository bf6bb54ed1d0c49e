"""Fixtures for all tests."""

import os
from pathlib import Path

import pytest
import torch

# One thread: the tensors are small, and threads that wait for each other on a busy machine cost more than they bring.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def real_dir() -> Path:
    """The folder with real photos and weights: `VISION_ATTN_REAL`, or `shared` beside the checkout."""
    path = Path(os.environ.get("VISION_ATTN_REAL", Path(__file__).parents[2] / "shared"))
    if not (path / "data").is_dir():
        pytest.skip(f"real photos and weights are not at {path}: set VISION_ATTN_REAL to their folder")
    return path
