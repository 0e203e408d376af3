"""The image and text encoders of a CLIP or SigLIP model: from pixels and prompts to features of norm 1."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer

from .preprocess import preprocessing_of
from .texts import PromptTokenizer, check_prompts, encoded_once

__all__ = ["ImageTextEncoder", "unit_norm"]


class ImageTextEncoder(nn.Module):
    """A frozen image–text model, differentiable in the images.

    Args:
        model: Hub id or local folder of a `CLIPModel`, `SiglipModel` or another with `get_image_features`.
        processor: Hub id or local folder of its tokenizer and image processor; `None` for `model`.
        name: name of the reward, for warnings.

    Attributes:
        scale: exp(logit_scale), the inverse temperature of the model's training.

    Raises:
        ValueError: if it is not an image–text model, or its image processor does more than resize, crop and normalise.
        ImportError: if its tokenizer needs packages that are not installed.
    """

    def __init__(self, model: str | Path, processor: str | Path | None = None, *, name: str) -> None:
        super().__init__()
        processor = model if processor is None else processor
        self.model = AutoModel.from_pretrained(model, dtype=torch.float32)
        if not hasattr(self.model, "get_text_features"):
            found = type(self.model).__name__
            raise ValueError(f"{model} is a {found}; pass a CLIPModel, a SiglipModel or another image–text model.")
        self.preprocess = preprocessing_of(processor)
        text = self.model.config.text_config
        tokenizer, padding = _tokenizer(processor), "longest"
        if self.model.config.model_type.startswith("siglip"):  # trained on texts padded to full length, without a mask
            tokenizer.model_input_names, padding = ["input_ids"], "max_length"
        self.tokenize = PromptTokenizer(tokenizer, text.max_position_embeddings, name, padding)
        self.scale = self.model.logit_scale.exp().item()  # a Python number: .to(bfloat16) would round a parameter
        self.requires_grad_(False).eval()

    def images(self, images: Tensor) -> Tensor:
        """Features of images (B, 3, H, W) in [0, 1]: (B, D), of norm 1, float32 or better."""
        pixels = self.preprocess(images)
        return unit_norm(self.model.get_image_features(pixel_values=pixels.to(self.model.dtype)).pooler_output)

    def texts(self, prompts: list[str]) -> Tensor:
        """Features of B texts: (B, D), of norm 1, float32 or better, without gradient."""
        return encoded_once(prompts, self._texts)

    def _texts(self, prompts: list[str]) -> Tensor:
        return unit_norm(self.model.get_text_features(**self.tokenize(prompts).to(self.model.device)).pooler_output)

    def cosine(self, images: Tensor, prompts: list[str]) -> Tensor:
        """cos(image, prompt), shape (B,).

        Raises:
            ValueError: for bad images, or if the number of prompts differs.
            TypeError: if the images are not floating.
        """
        check_prompts(prompts, images)
        return (self.images(images) * self.texts(prompts)).sum(-1)


def _tokenizer(processor: str | Path) -> Any:
    try:
        return AutoTokenizer.from_pretrained(processor)
    except ImportError as error:  # SigLIP's needs sentencepiece and protobuf
        raise ImportError(
            f"the tokenizer of {processor} cannot be loaded ({str(error).strip().split('. ')[0]}); run pip install "
            f'"diffusers-adjoint[rewards]".'
        ) from error


def unit_norm(features: Tensor) -> Tensor:
    """Features divided by their norm, in float32 or better; in 16 bits a cosine has steps of 0.002."""
    return F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)
