"""Rewards on the words; `diffusers-adjoint` finds them as examples/words/spelling.py:spelling. On the CPU, in float32."""

from __future__ import annotations

from recognisers import recogniser
from torch import Tensor
from word_pictures import word_of


def spelling(images: Tensor, prompts: list[str]) -> Tensor:
    """log p(word | image) of PP-OCRv4, nats: so that λ is an inverse temperature. Differentiable."""
    return _word_log_prob("v4", images, prompts)


def judge(images: Tensor, prompts: list[str]) -> Tensor:
    """log p(word | image) of PP-OCRv6, nats; never trained on."""
    return _word_log_prob("v6", images, prompts)


def _word_log_prob(name: str, images: Tensor, prompts: list[str]) -> Tensor:
    reader = recogniser(name)
    return reader.word_log_prob(reader(images), [word_of(prompt) for prompt in prompts])
