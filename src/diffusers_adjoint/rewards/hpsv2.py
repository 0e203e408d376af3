"""HPS v2.1 (arXiv 2306.09341): a CLIP model fine-tuned on which images of a prompt people prefer."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from .encoder import unit_norm
from .preprocess import check_images, differentiable_preprocess
from .texts import CutWarning, check_prompts, encoded_once
from .weights import published_file, read_weights

__all__ = ["HPSv2"]

ARCHITECTURE = "ViT-H-14"


class HPSv2(nn.Module):
    """r = cos(image, prompt), differentiable in the images; frozen, in float32 unless moved by `.to(dtype)`.

    Range: generated images score about 0.2–0.35; the paper reports 100 times that. It was trained with the logits
    exp(logit_scale)·r ≈ 100 r. So with a weight of 100 the unit is nats: of two images for one prompt, the model prefers the
    first with probability sigmoid(100 (r₁ − r₂)).

    Args:
        model: Hub id, local folder or local file of the weights.

    Raises:
        ImportError: if open_clip is not installed.
        ValueError: if the file does not hold these weights.
    """

    def __init__(self, model: str | Path = "xswu/HPSv2") -> None:
        super().__init__()
        open_clip = _open_clip()
        file = published_file(model, "HPS_v2.1_compressed.pt")
        self.model = open_clip.CLIP(**open_clip.get_model_config(ARCHITECTURE))
        try:
            self.model.load_state_dict(read_weights(file))
        except RuntimeError as error:
            raise ValueError(f"{file} does not hold the weights of a {ARCHITECTURE}; pass HPS_v2.1_compressed.pt.") from error
        self.mean, self.std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
        self.tokenizer = open_clip.get_tokenizer(ARCHITECTURE)
        self._warn_of_cut = CutWarning("HPSv2", self.tokenizer.context_length)
        self.requires_grad_(False).eval()

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
        check_prompts(prompts, images)
        return (self.features(images) * encoded_once(prompts, self._texts)).sum(-1)

    def features(self, images: Tensor) -> Tensor:
        """Image features of norm 1, (B, D), for measuring diversity."""
        pixels = _with_borders(images, self.model.visual.image_size[0], self.mean, self.std)
        return unit_norm(self.model.encode_image(pixels.to(self.model.logit_scale.dtype)))

    def _texts(self, prompts: list[str]) -> Tensor:
        self._warn_of_cut(len(self.tokenizer.encode(prompt)) + 2 for prompt in prompts)  # + 2 for the start and end tokens
        return unit_norm(self.model.encode_text(self.tokenizer(prompts).to(self.model.logit_scale.device)))


def _open_clip() -> Any:
    try:
        return importlib.import_module("open_clip")
    except ImportError as error:
        raise ImportError(
            f'the package open_clip cannot be imported ({error}); run pip install "diffusers-adjoint[rewards]".'
        ) from error


def _with_borders(images: Tensor, size: int, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """The whole image scaled into size × size pixels, with black borders if it is not square, as in HPS's own evaluation."""
    check_images(images)
    scale = size / max(images.shape[-2:])
    height, width = (round(side * scale) for side in images.shape[-2:])
    small = differentiable_preprocess(images, (height, width), (0.0,) * 3, (1.0,) * 3, resize=(height, width))
    top, left = (size - height) // 2, (size - width) // 2
    return differentiable_preprocess(F.pad(small, (left, size - width - left, top, size - height - top)), size, mean, std)
