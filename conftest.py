"""Every test and doctest runs in its own folder, on one thread, with no network and no wandb."""

import os

os.environ["WANDB_MODE"] = "disabled"
os.environ["OMP_NUM_THREADS"] = "1"

import pytest


@pytest.fixture(autouse=True)
def _alone(tmp_path, monkeypatch):
    """A clean working folder: nothing is written into the tree."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    import torch

    torch.set_num_threads(1)
