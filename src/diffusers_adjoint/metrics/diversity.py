"""How different images of one prompt are from each other: what a hacked reward loses first."""

from __future__ import annotations

import torch
from torch import Tensor

from .estimate import Estimate, sample_mean

__all__ = ["pairwise_diversity"]


def pairwise_diversity(features: Tensor) -> Estimate:
    """Mean squared distance between the features of two images of one prompt, averaged over prompts (2409.08861, app. G).

    2/(N(N − 1)) Σ_{i<j} ‖f_i − f_j‖² per prompt. The paper prints it times 100.

    Args:
        features: f, shape (P, N, D), P prompts with N ≥ 2 images each; any floating dtype, computed in float64.

    Returns:
        Estimate in squared feature units. Its standard error is the spread over prompts; with one prompt, the jackknife over its
        images (NaN for N = 2).

    Raises:
        ValueError: if the shape is wrong, N < 2 or a feature is not finite.
    """
    if features.ndim != 3 or features.shape[0] < 1 or features.shape[1] < 2:
        raise ValueError(
            f"features has shape {tuple(features.shape)}; pass (prompts, images, feature), with at least two images a prompt."
        )
    f = features.detach().cpu().to(torch.float64)
    if not torch.isfinite(f).all():
        raise ValueError("features holds NaN or infinite values; pass finite features only.")
    row_sums = _squared_distance_sums(f)
    images = f.shape[1]
    per_prompt = row_sums.sum(1) / (images * (images - 1))
    return sample_mean(per_prompt) if len(f) > 1 else _jackknife(row_sums[0])


def _squared_distance_sums(f: Tensor) -> Tensor:
    """Σ_j ‖f_i − f_j‖² = N ‖f_i − f̄‖² + Σ_j ‖f_j − f̄‖², shape (P, N): no N × N table is needed."""
    from_centre = (f - f.mean(1, keepdim=True)).square().sum(2)
    return f.shape[1] * from_centre + from_centre.sum(1, keepdim=True)


def _jackknife(row_sums: Tensor) -> Estimate:
    """Diversity of one prompt and its error from leaving out each image in turn (the images share pairs, so no s/√N)."""
    images = len(row_sums)
    total = row_sums.sum() / 2
    value = total / (images * (images - 1) / 2)
    if images == 2:
        return Estimate(value.item(), torch.nan)
    left_out = (total - row_sums) / ((images - 1) * (images - 2) / 2)
    variance = (images - 1) / images * (left_out - left_out.mean()).square().sum()
    return Estimate(value.item(), variance.sqrt().item())
