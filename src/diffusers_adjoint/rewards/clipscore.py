"""CLIPScore (Hessel et al., arXiv 2104.08718): how well an image fits its prompt, by CLIP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .encoder import ImageTextEncoder

__all__ = ["CLIPScore"]


class CLIPScore(nn.Module):
    """r = 100 · cos(image, prompt), differentiable in the images; frozen, in float32 unless moved by `.to(dtype)`.

    Range: [−100, 100]; images that show their prompt score about 20–35. The scale is that of torchmetrics and of the tables of
    arXiv 2409.08861. Hessel et al. define 2.5·max(cos, 0). The maximum is left out here, because its gradient is 0 below 0.

    Args:
        model: Hub id or local folder of a `CLIPModel`, with its tokenizer and image processor.
    """

    def __init__(self, model: str | Path = "openai/clip-vit-large-patch14") -> None:
        super().__init__()
        self.encoder = ImageTextEncoder(model, name="CLIPScore")
        self.eval()

    def forward(self, images: Tensor, prompts: list[str], **columns: Any) -> Tensor:
        """Scores, shape (B,), float32 or better.

        Args:
            images: (B, 3, H, W) in [0, 1], floating, on the model's device.
            prompts: one for each image; a prompt longer than the text encoder's 77 tokens is cut.
            columns: ignored.

        Raises:
            ValueError: if the images have the wrong shape or range, or the number of prompts differs.
            TypeError: if the images are not floating.
        """
        return 100 * self.encoder.cosine(images, prompts)

    def features(self, images: Tensor) -> Tensor:
        """Image features of norm 1, (B, D), for measuring diversity."""
        return self.encoder.images(images)
