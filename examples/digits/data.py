"""Handwritten digits as images, prompts and labels, and two classifiers that are trained on different images.

The images are scikit-learn's `load_digits` (UCI Optical Recognition of Handwritten Digits, 1797 images of 8×8), enlarged to
32×32. `read_digits` is the referee: a support vector machine on 8×8 pixels, fitted on the images with an even index. It never
enters a reward. `DigitClassifier` is what a reward may use: a small convolutional network trained on the other images.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.svm import SVC
from torch import Tensor, nn

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIGIT_PROMPTS = tuple(f"a handwritten {word}" for word in WORDS)
OPEN_PROMPT = "a handwritten digit"
IMAGE_SIZE = 32


def digit_images() -> tuple[Tensor, Tensor]:
    """All images, (1797, 3, 32, 32) float32 in [0, 1] with three equal channels, and their labels, (1797,) int64."""
    digits = load_digits()
    small = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    large = F.interpolate(small, size=(IMAGE_SIZE, IMAGE_SIZE), mode="bicubic", align_corners=False).clamp(0, 1)
    return large.expand(-1, 3, -1, -1).contiguous(), torch.tensor(digits.target)


def to_raw_digits(images: Tensor) -> np.ndarray:
    """(B, 3, H, W) in [0, 1] → (B, 64) in 0 … 16, the units of `load_digits().data`."""
    small = F.interpolate(images.detach().float().cpu().mean(1, keepdim=True), size=(8, 8), mode="area")
    return 16 * small.flatten(1).numpy()


@lru_cache(maxsize=1)
def _reader() -> SVC:
    digits = load_digits()
    return SVC(gamma=1e-3).fit(digits.data[::2], digits.target[::2])


def read_digits(images: Tensor) -> Tensor:
    """The digit that the referee reads in each image: (B, 3, H, W) in [0, 1] → (B,) int64. Deterministic."""
    return torch.from_numpy(_reader().predict(to_raw_digits(images))).long()


def reader_accuracy() -> float:
    """Share of the 898 real digits kept from the referee that it reads correctly."""
    digits = load_digits()
    return float(_reader().score(digits.data[1::2], digits.target[1::2]))


class DigitClassifier(nn.Module):
    """(B, 3, 32, 32) in [0, 1] → log-probabilities (B, 10), differentiable in the images."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.AvgPool2d(2),
            nn.Conv2d(1, 16, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(32, 32, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Flatten(),
            nn.Linear(512, 10),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(2 * images.mean(1, keepdim=True) - 1).log_softmax(1)


def train_digit_classifier(steps: int = 400, seed: int = 0) -> tuple[DigitClassifier, float]:
    """Trains on the images with an odd index; returns the frozen network and its accuracy on the even ones."""
    images, labels = digit_images()
    train_images, train_labels = images[1::2], labels[1::2]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classifier = DigitClassifier()
        optimizer = torch.optim.AdamW(classifier.parameters(), lr=2e-3, weight_decay=1e-2)
        for _ in range(steps):
            batch = torch.randint(0, len(train_images), (64,))
            shift = torch.randint(-3, 4, (2,)).tolist()
            log_probs = classifier(train_images[batch].roll(shift, dims=(2, 3)))
            loss = F.nll_loss(log_probs, train_labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    classifier.eval().requires_grad_(False)
    accuracy = (classifier(images[::2]).argmax(1) == labels[::2]).float().mean().item()
    return classifier, accuracy
