"""Prompts as a reward's text encoder reads them."""

from __future__ import annotations

from typing import Any

from diffusers.utils import logging
from torch import Tensor
from transformers import PreTrainedTokenizerBase

__all__ = ["PromptTokenizer", "check_prompts"]

logger = logging.get_logger(__name__)


class PromptTokenizer:
    """Cuts prompts to the encoder's length, and says so once.

    Args:
        tokenizer: of the text encoder.
        length: tokens that it reads, special ones included.
        name: the reward's, for the warning.
        padding: "longest", or "max_length" for encoders that were trained that way.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, length: int, name: str, padding: str = "longest") -> None:
        self.tokenizer, self.length, self.name, self.padding = tokenizer, length, name, padding
        self._told_of_cut = False

    def __call__(self, prompts: list[str]) -> Any:
        """Token ids and masks as `tokenizer(…, return_tensors="pt")` gives them, on the CPU."""
        if not self._told_of_cut and any(len(ids) > self.length for ids in self.tokenizer(prompts, verbose=False).input_ids):
            logger.warning(f"{self.name} reads the first {self.length} tokens of a prompt; longer prompts are cut.")
            self._told_of_cut = True
        return self.tokenizer(prompts, padding=self.padding, truncation=True, max_length=self.length, return_tensors="pt")


def check_prompts(prompts: list[str], images: Tensor) -> None:
    """Raises ValueError unless there is one prompt for each image."""
    if isinstance(prompts, str) or len(prompts) != len(images):
        got = "one string" if isinstance(prompts, str) else f"a list of {len(prompts)}"
        raise ValueError(f"prompts is {got} for {len(images)} images; pass a list with one prompt for each image.")
