"""Every test runs offline and from one seed, alone or in company."""

import os

# Read when the host libraries are imported, so they are set before any test module is.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import pytest
import torch


@pytest.fixture(autouse=True)
def seed() -> None:
    """The same random numbers whatever ran before; tests that need many draws make their own generators."""
    torch.manual_seed(0)
