"""The demo's rewards, which also measure its samples; on the command line, examples/digits/rewards.py:ink for example."""

from __future__ import annotations

from functools import lru_cache

import torch
from data import DIGIT_PROMPTS, DigitClassifier, train_digit_classifier
from torch import Tensor


def ink(images: Tensor, prompts: list[str]) -> Tensor:
    """Mean brightness of each image, in [0, 1]."""
    return images.mean((1, 2, 3))


def three(images: Tensor, prompts: list[str]) -> Tensor:
    """Log-probability of a three, nats."""
    return _classifier()(images)[:, 3]


def as_asked(images: Tensor, prompts: list[str]) -> list[Tensor | None]:
    """Log-probability of the digit that the prompt names, nats; no value for other prompts."""
    rows = zip(_classifier()(images), prompts, strict=True)
    return [row[DIGIT_PROMPTS.index(prompt)] if prompt in DIGIT_PROMPTS else None for row, prompt in rows]


@lru_cache(maxsize=1)
def _classifier() -> DigitClassifier:
    with torch.enable_grad():  # the classifier is trained at its first use, which may be in an evaluation without gradients
        return train_digit_classifier()[0]
