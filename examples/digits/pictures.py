"""The demo's figures: grids of digits, the reward curve, class shares."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from data import WORDS
from PIL import Image
from torch import Tensor


def save_grid(images: Tensor, path: Path, columns: int = 12, scale: int = 2) -> None:
    """Save images (N, 3, H, W) in [0, 1] row by row, with a thin border."""
    bordered = np.pad(images.mean(1).numpy(), ((0, 0), (1, 1), (1, 1)), constant_values=0.5)
    rows = [np.concatenate(bordered[i : i + columns], axis=1) for i in range(0, len(bordered) - columns + 1, columns)]
    grid = Image.fromarray((255 * np.concatenate(rows)).round().astype(np.uint8))
    grid.resize((grid.width * scale, grid.height * scale), Image.Resampling.NEAREST).save(path)


def save_reward_curve(rewards: list[float], target: float, path: Path, name: str) -> None:
    """Plot the mean reward of each update's rollouts, and the mean reward of the exact tilt."""
    figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
    axes.plot(range(1, len(rewards) + 1), rewards, marker=".", linewidth=1)
    axes.axhline(target, color="black", linestyle="--", linewidth=1, label="exact tilt (importance weights)")
    axes.legend(loc="lower right")
    axes.set(xlabel="update", ylabel=f"mean reward ({name})", title="Rollouts of the model in training")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def save_class_shares(shares: dict[str, Tensor], path: Path) -> None:
    """Plot the shares of the digits for base, target (importance-weighted base) and fine-tuned model."""
    figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
    for i, (name, row) in enumerate(shares.items()):
        axes.bar(np.arange(10) + 0.27 * (i - 1), row.numpy(), width=0.25, label=name)
    axes.set(xticks=range(10), xticklabels=WORDS, ylabel="share of samples", title="Digits read by the referee")
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
