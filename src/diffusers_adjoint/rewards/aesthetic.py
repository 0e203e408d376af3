"""LAION's improved aesthetic predictor (sac+logos+ava1-l14-linearMSE): how people rate an image, whatever its prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPVisionModelWithProjection

from .encoder import unit_norm
from .preprocess import preprocessing_of
from .weights import published_file, read_weights

__all__ = ["AestheticScore"]

FILES = ("model.safetensors", "aesthetic-model.pth", "sac+logos+ava1-l14-linearMSE.pth")
LAYERS = [f"layers.{number}" for number in (0, 2, 4, 6, 7)]  # the numbers between are dropout layers


class AestheticScore(nn.Module):
    """r = w·f + b, where f is the CLIP ViT-L/14 image embedding of norm 1; differentiable in the images, frozen.

    The published head (christophschuhmann/improved-aesthetic-predictor) is five linear layers without a nonlinearity between
    them. They are multiplied into the single layer (w, b) here. So the reward moves every image along the same direction w of
    CLIP's space.

    Range: trained on ratings from 1 to 10; most images score 4–7.

    Args:
        predictor: Hub id, local folder or local file of the head's weights.
        model: Hub id or local folder of the `CLIPModel`, of which only the image encoder is kept.

    Raises:
        ValueError: if the file holds no such head, or one for another CLIP model.
    """

    def __init__(
        self,
        predictor: str | Path = "trl-lib/ddpo-aesthetic-predictor",
        model: str | Path = "openai/clip-vit-large-patch14",
    ) -> None:
        super().__init__()
        self.model = CLIPVisionModelWithProjection.from_pretrained(model, dtype=torch.float32)
        self.preprocess = preprocessing_of(model)
        self.head = _head(published_file(predictor, *FILES), self.model.config.projection_dim)
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor, prompts: list[str] | None = None, **columns: Any) -> Tensor:
        """Scores, shape (B,), float32 or better.

        Args:
            images: (B, 3, H, W) in [0, 1], floating, on the model's device.
            prompts, columns: ignored.

        Raises:
            ValueError: if the images have the wrong shape or range.
            TypeError: if the images are not floating.
        """
        features = self.features(images)
        return F.linear(features, self.head.weight.to(features), self.head.bias.to(features)).squeeze(-1)

    def features(self, images: Tensor) -> Tensor:
        """Image features of norm 1, (B, D), for measuring diversity."""
        pixels = self.preprocess(images)
        return unit_norm(self.model(pixel_values=pixels.to(self.model.dtype)).image_embeds)


def _head(file: Path, width: int) -> nn.Linear:
    """The published layers multiplied into one, in float64.

    Raises:
        ValueError: if the file holds other tensors, or layers that do not map `width` features to one number.
    """
    weights = read_weights(file)
    if set(weights) != {f"{layer}.{kind}" for layer in LAYERS for kind in ("weight", "bias")}:
        raise ValueError(f"{file} holds {', '.join(sorted(weights)[:3])}, …; pass the head's file, with {', '.join(LAYERS)}.")
    weight, bias = torch.eye(width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64)
    head = nn.Linear(width, 1)
    try:
        for layer in LAYERS:
            step = weights[f"{layer}.weight"].double()
            weight, bias = step @ weight, step @ bias + weights[f"{layer}.bias"].double()
        head.load_state_dict({"weight": weight, "bias": bias})
    except RuntimeError as error:
        raise ValueError(f"{file} does not map {width} features to one number; pass the head of this CLIP model.") from error
    return head
