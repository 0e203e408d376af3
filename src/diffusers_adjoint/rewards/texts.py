"""Tokenise and encode prompts for a reward's text encoder."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from diffusers.utils import logging
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .preprocess import check_tensor

__all__ = ["CutWarning", "PromptTokenizer", "check_prompts", "encoded_once"]

logger = logging.get_logger(__name__)


class CutWarning:
    """Warns once that long prompts are cut.

    Args:
        name: name of the reward.
        length: number of tokens that its text encoder reads, including special tokens.
    """

    def __init__(self, name: str, length: int) -> None:
        self.name, self.length = name, length
        self._given = False

    def __call__(self, lengths: Iterable[int]) -> None:
        """Warn, the first time, if one of these numbers of tokens is above the encoder's."""
        if not self._given and any(length > self.length for length in lengths):
            logger.warning(f"{self.name} reads the first {self.length} tokens of a prompt; longer prompts are cut.")
            self._given = True


class PromptTokenizer:
    """Tokenises prompts, cuts them to the encoder's length, and warns once if one is cut.

    Args:
        tokenizer: the text encoder's tokenizer.
        length: number of tokens that the encoder reads, including special tokens.
        name: name of the reward, for the warning.
        padding: "longest", or "max_length" for encoders that were trained with it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, length: int, name: str, padding: str = "longest") -> None:
        self.tokenizer, self.length, self.padding = tokenizer, length, padding
        self._warn_of_cut = CutWarning(name, length)

    def __call__(self, prompts: list[str]) -> Any:
        """Token ids and masks as `tokenizer(…, return_tensors="pt")` gives them, on the CPU."""
        self._warn_of_cut(len(ids) for ids in self.tokenizer(prompts, verbose=False).input_ids)
        return self.tokenizer(prompts, padding=self.padding, truncation=True, max_length=self.length, return_tensors="pt")


def encoded_once(prompts: list[str], encode: Callable[[list[str]], Tensor]) -> Tensor:
    """`encode` applied to B texts, (B, D), without gradient; a text that occurs several times is encoded once."""
    distinct = list(dict.fromkeys(prompts))
    with torch.no_grad():
        return encode(distinct)[[distinct.index(prompt) for prompt in prompts]]


def check_prompts(prompts: list[str], images: Tensor) -> None:
    """Raise ValueError or TypeError unless `prompts` is a list with one string for each image."""
    check_tensor(images)
    if isinstance(prompts, str) or (isinstance(prompts, list | tuple) and len(prompts) != len(images)):
        got = "one string" if isinstance(prompts, str) else f"a list of {len(prompts)}"
        raise ValueError(f"prompts is {got} for {len(images)} images; pass a list with one prompt for each image.")
    if not isinstance(prompts, list | tuple) or not all(isinstance(prompt, str) for prompt in prompts):
        raise TypeError(f"prompts is {prompts!r:.60}; pass a list of strings, one for each image.")
