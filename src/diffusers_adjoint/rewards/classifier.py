"""An image classifier as a reward: the log probability of a class."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForImageClassification

from .preprocess import preprocessing_of

__all__ = ["ClassLogProbability"]


class ClassLogProbability(nn.Module):
    """r = log p(class | image), in nats, (−∞, 0], differentiable in the images; frozen, in float32 unless moved by `.to(dtype)`.

    With weight 1 the target p_base(x) · p(class | x) is, up to its normaliser, the base's distribution given the class.

    Args:
        model: Hub id or local folder of an image classifier with mutually exclusive classes, and of its image processor.
        label: index or name (`config.id2label`) of the class. `None` reads the dataset column `label`, with an index or a name
            for each image.

    Raises:
        ValueError: if the model has no such class, or does not have mutually exclusive classes.
    """

    def __init__(self, model: str | Path, label: int | str | None = None) -> None:
        super().__init__()
        self.model = AutoModelForImageClassification.from_pretrained(model, dtype=torch.float32)
        self.preprocess = preprocessing_of(model)
        config = self.model.config
        if config.num_labels < 2 or config.problem_type in ("regression", "multi_label_classification"):
            raise ValueError(f"{model} does not choose one of several classes; pass a classifier with exclusive classes.")
        self.label = None if label is None else _index(label, config.id2label)
        self.requires_grad_(False).eval()

    def forward(
        self, images: Tensor, prompts: list[str] | None = None, label: Sequence[int | str] | None = None, **columns: Any
    ) -> Tensor:
        """Log probabilities, shape (B,), float32 or better.

        Args:
            images: (B, 3, H, W) in [0, 1], floating, on the model's device.
            label: index or name of a class for each image, used if the constructor got none.
            prompts, columns: ignored.

        Raises:
            ValueError: if the images have the wrong shape or range, or the labels are missing, unknown or not one for each image.
            TypeError: if the images are not floating.
        """
        pixels = self.preprocess(images)
        classes = self._classes(label, len(images))
        logits = self.model(pixel_values=pixels.to(self.model.dtype)).logits
        log_probabilities = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        return log_probabilities[torch.arange(len(images)), classes]

    def _classes(self, label: Sequence[int | str] | None, count: int) -> list[int]:
        if self.label is not None:
            return [self.label] * count
        if label is None:
            raise ValueError("label is missing; pass ClassLogProbability(model, label=…) or a dataset column 'label'.")
        if isinstance(label, str) or len(label) != count:
            got = "one string" if isinstance(label, str) else f"a list of {len(label)}"
            raise ValueError(f"label is {got} for {count} images; pass a list with one class for each image.")
        return [_index(name, self.model.config.id2label) for name in label]


def _index(label: int | str, names: dict[int, str]) -> int:
    """The class of this index or name."""
    found = [index for index, name in names.items() if label in (index, name)]
    if len(found) == 1:
        return found[0]
    if found:  # ImageNet has two classes "crane", for example
        raise ValueError(f"label {label!r} names the classes {found}; pass one of these numbers.")
    examples = ", ".join(f"{index} ({name!r})" for index, name in list(names.items())[:5])
    raise ValueError(f"label {label!r} is none of the model's {len(names)} classes; pass one of {examples}, ….")
