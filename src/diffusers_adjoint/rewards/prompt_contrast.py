"""One text against another by a CLIP or SigLIP model, such as "a sunny day" rather than "a rainy day"."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .encoder import ImageTextEncoder
from .texts import check_prompts

__all__ = ["PromptContrast"]


class PromptContrast(nn.Module):
    """r = exp(logit_scale) · (cos(image, positive) − cos(image, negative)), in nats, differentiable in the images; frozen.

    These are the log odds of the model's own zero-shot classifier. CLIP chooses between the two texts (arXiv 2103.00020, §3.1.2),
    and P(positive)/P(negative) = e^r. SigLIP judges each text alone (arXiv 2303.15343, §3.2), and r is the log odds of the
    positive text minus those of the negative one; its bias cancels. With weight 1, training multiplies the base's density by e^r.

    Range: |r| ≤ 2 exp(logit_scale), about 200; typically within ±15.

    Args:
        positive: the text that images should fit; `None` for each image's own prompt.
        negative: the text that they should not fit. The default, the empty text, fits any image.
        model: Hub id or local folder of a `CLIPModel` or `SiglipModel`, with its tokenizer and image processor.
    """

    def __init__(
        self, positive: str | None = None, negative: str = "", model: str | Path = "google/siglip-base-patch16-224"
    ) -> None:
        super().__init__()
        self.positive, self.negative = positive, negative
        self.encoder = ImageTextEncoder(model, name="PromptContrast")
        self.eval()

    def forward(self, images: Tensor, prompts: list[str], **columns: Any) -> Tensor:
        """Log odds, shape (B,), float32 or better.

        Args:
            images: (B, 3, H, W) in [0, 1], floating, on the model's device.
            prompts: one for each image, used if `positive` is `None`; a prompt too long for the text encoder is cut.
            columns: ignored.

        Raises:
            ValueError: if the images have the wrong shape or range, or the number of prompts differs.
            TypeError: if the images are not floating.
        """
        check_prompts(prompts, images)
        positives = prompts if self.positive is None else [self.positive]
        texts = self.encoder.texts([*positives, self.negative])
        return self.encoder.scale * (self.encoder.images(images) * (texts[:-1] - texts[-1])).sum(-1)

    def features(self, images: Tensor) -> Tensor:
        """Image features of norm 1, (B, D), for measuring diversity."""
        return self.encoder.images(images)
