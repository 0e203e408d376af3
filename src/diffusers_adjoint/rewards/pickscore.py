"""PickScore (arXiv 2305.01569): a CLIP model fine-tuned on which of two images people picked for a prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .encoder import ImageTextEncoder

__all__ = ["PickScore"]

PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
SETTINGS = ["preprocessor_config.json", "processor_config.json"]  # files of an image processor, and of a whole processor


class PickScore(nn.Module):
    """r = exp(logit_scale) · cos(image, prompt), differentiable in the images; frozen, in float32 unless moved by `.to(dtype)`.

    Range: the published weights have exp(logit_scale) ≈ 100, so generated images score about 18–24. The unit is nats: of two
    images for one prompt, the model prefers the first with probability sigmoid(r₁ − r₂).

    Args:
        model: Hub id or local folder of a `CLIPModel`.
        processor: Hub id or local folder of its tokenizer and image processor. `None` takes them from the model's local folder,
            if it has them, else those that the published model was trained with.
    """

    def __init__(
        self,
        model: str | Path = "yuvalkirstain/PickScore_v1",
        processor: str | Path | None = None,
    ) -> None:
        super().__init__()
        if processor is None and not any((Path(model) / name).is_file() for name in SETTINGS):
            processor = PROCESSOR
        self.encoder = ImageTextEncoder(model, processor, name="PickScore")
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
        return self.encoder.scale * self.encoder.cosine(images, prompts)

    def features(self, images: Tensor) -> Tensor:
        """Image features of norm 1, (B, D), for measuring diversity."""
        return self.encoder.images(images)
