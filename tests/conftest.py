"""Shared fixtures."""

from pathlib import Path

import pytest
import torch

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def golden_ops():
    """Numbers of the published code for single operations; see golden/README.md."""
    return torch.load(GOLDEN / "ops.pt", weights_only=True)


@pytest.fixture(scope="session")
def golden_iteration():
    """One whole distillation iteration of the published code; see golden/README.md."""
    return torch.load(GOLDEN / "datm_iteration.pt", weights_only=True)
