"""PickScore (arXiv 2305.01569): a CLIP fine-tuned on which of two images people picked for a prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from .preprocess import differentiable_preprocess

__all__ = ["PickScore"]

logger = logging.get_logger(__name__)


class PickScore(nn.Module):
    """r = exp(logit_scale) · cos(image, prompt), differentiable in the images; frozen, in float32 unless moved by `.to(dtype)`.

    The published weights have exp(logit_scale) ≈ 100, so generated images score about 18–24. Differences are nats: of two
    images for one prompt, the model says that the first is preferred with probability sigmoid(r₁ − r₂).

    Args:
        model: Hub id or local folder of a `CLIPModel` in safetensors.
        processor: Hub id or local folder of its tokenizer and image processor.
    """

    def __init__(
        self,
        model: str | Path = "yuvalkirstain/PickScore_v1",
        processor: str | Path = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    ) -> None:
        super().__init__()
        self.clip = CLIPModel.from_pretrained(model, dtype=torch.float32, use_safetensors=True)
        self.tokenizer = CLIPTokenizer.from_pretrained(processor)
        pixels = CLIPImageProcessorPil.from_pretrained(processor)
        self.mean, self.std = pixels.image_mean, pixels.image_std
        self.scale = self.clip.logit_scale.exp().item()  # a number, so that .to(bfloat16) does not round it
        self._told_of_cut = False
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor, prompts: list[str], **columns: Any) -> Tensor:
        """Scores, shape (B,), float32 or better.

        Args:
            images: (B, 3, H, W) in [0, 1], floating, on the model's device.
            prompts: one for each image; what does not fit the text encoder (77 tokens) is cut off.
            columns: ignored.

        Raises:
            ValueError: if the images have the wrong shape or the number of prompts differs.
            TypeError: if the images are not floating.
        """
        pixels = differentiable_preprocess(images, self.clip.config.vision_config.image_size, self.mean, self.std)
        if isinstance(prompts, str) or len(prompts) != len(images):
            got = "one string" if isinstance(prompts, str) else f"a list of {len(prompts)}"
            raise ValueError(f"prompts is {got} for {len(images)} images; pass a list with one prompt for each image.")
        image = self.clip.get_image_features(pixel_values=pixels).pooler_output
        text = self._embed(prompts)
        dtype = torch.promote_types(image.dtype, torch.float32)
        return self.scale * F.cosine_similarity(image.to(dtype), text.to(dtype), dim=-1)

    def _embed(self, prompts: list[str]) -> Tensor:
        length = self.clip.config.text_config.max_position_embeddings
        if not self._told_of_cut and any(len(ids) > length for ids in self.tokenizer(prompts, verbose=False).input_ids):
            logger.warning(f"PickScore reads the first {length} tokens of a prompt; longer prompts are cut.")
            self._told_of_cut = True
        tokens = self.tokenizer(prompts, padding=True, truncation=True, max_length=length, return_tensors="pt")
        with torch.no_grad():
            return self.clip.get_text_features(**tokens.to(self.clip.device)).pooler_output
