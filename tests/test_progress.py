"""Bars for what takes long, and for nothing else."""

import io
import sys
import time

import pytest
import torch
from datasets import Dataset
from tiny_trainer import PROMPTS, make_trainer

import diffusers_adjoint.trainer.progress
from diffusers_adjoint.trainer.progress import progress


def test_a_bar_counts_forwards_and_goes(monkeypatch):
    monkeypatch.setattr(diffusers_adjoint.trainer.progress, "PATIENCE", 0.0)
    monkeypatch.setattr(sys, "stderr", screen := io.StringIO())
    layer = torch.nn.Linear(1, 1)
    with progress(layer, "rollout", 3, shown=True):
        for _ in range(3):
            time.sleep(0.15)  # bars are drawn ten times a second at most
            assert layer(torch.zeros(1, 1)).shape == (1, 1)
    assert "rollout" in screen.getvalue() and "3/3" in screen.getvalue()
    assert not layer._forward_hooks


@pytest.mark.parametrize("patience", [0.0, 3.0])
def test_bars_of_training_and_evaluation(tmp_path, monkeypatch, patience):
    monkeypatch.setattr(diffusers_adjoint.trainer.progress, "PATIENCE", patience)
    rows = Dataset.from_dict({"prompt": PROMPTS[:1]})
    trainer = make_trainer(tmp_path, eval_dataset=rows, disable_tqdm=False, max_steps=1, eval_strategy="steps", eval_steps=1)
    monkeypatch.setattr(sys, "stderr", screen := io.StringIO())
    trainer.train()
    assert "evaluation" in screen.getvalue()
    shown = [what in screen.getvalue() for what in ("update 1, paths and targets", "update 1, loss")]
    assert shown == [patience == 0.0] * 2  # an update of a tenth of a second needs no bar


def test_no_bars_when_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(diffusers_adjoint.trainer.progress, "PATIENCE", 0.0)
    monkeypatch.setattr(sys, "stderr", screen := io.StringIO())
    make_trainer(tmp_path, eval_dataset=Dataset.from_dict({"prompt": PROMPTS[:1]}), max_steps=1).train()
    assert "update 1" not in screen.getvalue()
