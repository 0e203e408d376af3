"""Diversity of the images of one prompt, which falls first when a reward is hacked."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .estimate import Estimate, sample_mean

__all__ = ["pairwise_diversity", "prompt_diversity", "vendi_score"]


LEFT_OUT = 30  # most images that the Vendi score's jackknife leaves out, one at a time; each costs a computation of the score


def pairwise_diversity(features: Tensor) -> Estimate:
    """Mean squared distance between the features of two images of one prompt, averaged over prompts (2409.08861, app. G).

    2/(N(N − 1)) Σ_{i<j} ‖f_i − f_j‖² per prompt. The paper prints it times 100.

    Args:
        features: f, shape (P, N, D), P prompts with N ≥ 2 images each; any floating dtype, computed in float64.

    Returns:
        Estimate in squared feature units. Its standard error is over prompts; for one prompt, by the jackknife over its images
        (NaN for N = 2).

    Raises:
        ValueError: if the shape is wrong, N < 2 or a feature is not finite.
    """
    row_sums = _squared_distance_sums(_checked(features))
    images = row_sums.shape[1]
    total = row_sums.sum(1) / 2
    per_prompt = total / (images * (images - 1) / 2)
    if len(per_prompt) > 1:
        return sample_mean(per_prompt)
    return _jackknife(per_prompt[0], (total - row_sums[0]) / ((images - 1) * (images - 2) / 2), images)


def vendi_score(features: Tensor) -> Estimate:
    """Effective number of different images of one prompt, averaged over prompts (Friedman & Dieng, 2210.02410, Definition 3.1).

    exp(−Σ_i μ_i log μ_i) with the eigenvalues μ of K/N, K_ij = cos(f_i, f_j), per prompt. It grows with N: compare scores of the
    same N only.

    Args:
        features: f, shape (P, N, D), P prompts with N ≥ 2 images each; any floating dtype, computed in float64.

    Returns:
        Estimate in [1, N]: 1 if all features have the same direction, N if all are orthogonal. Its standard error is over
        prompts; for one prompt, by the jackknife over its images (NaN for N = 2), or over some of them if there are more than
        `LEFT_OUT`, because each takes O(N³).

    Raises:
        ValueError: if the shape is wrong, N < 2, or a feature is not finite or zero.
    """
    f = _checked(features)
    norms = f.norm(dim=2, keepdim=True)
    if not norms.all():
        raise ValueError("features holds a vector of zeros, which has no direction; pass features of non-zero norm.")
    directions = f / norms
    kernel = directions @ directions.mT
    scores = _effective_number(kernel)
    if len(scores) > 1:
        return sample_mean(scores)
    images = range(0, f.shape[1], -(-f.shape[1] // LEFT_OUT))
    return _jackknife(scores[0], torch.stack([_effective_number(_without(kernel[0], i)) for i in images]), f.shape[1])


def prompt_diversity(diversity: Callable[[Tensor], Estimate], features: Tensor) -> Estimate:
    """Diversity of the images of one prompt with finite features; NaN if there are fewer than two.

    Args:
        diversity: `pairwise_diversity` or `vendi_score`.
        features: shape (N, D), one row for each image. Rows with NaN or infinite features, as from an overflowing 16-bit decoder,
            are left out.
    """
    finite = features[features.isfinite().all(1)]
    return diversity(finite[None]) if len(finite) > 1 else Estimate(torch.nan, torch.nan)


def _checked(features: Tensor) -> Tensor:
    """The features as float64 on the CPU, checked."""
    if features.ndim != 3 or features.shape[0] < 1 or features.shape[1] < 2:
        raise ValueError(
            f"features has shape {tuple(features.shape)}; pass (prompts, images, feature), with at least two images a prompt."
        )
    f = features.detach().cpu().to(torch.float64)
    if not torch.isfinite(f).all():
        raise ValueError("features holds NaN or infinite values; pass finite features only.")
    return f


def _squared_distance_sums(f: Tensor) -> Tensor:
    """Σ_j ‖f_i − f_j‖² = N ‖f_i − f̄‖² + Σ_j ‖f_j − f̄‖², shape (P, N): no N × N table is needed."""
    from_centre = (f - f.mean(1, keepdim=True)).square().sum(2)
    return f.shape[1] * from_centre + from_centre.sum(1, keepdim=True)


def _effective_number(kernel: Tensor) -> Tensor:
    """exp of the entropy of the eigenvalues of K/N, (…, N, N) → (…)."""
    eigenvalues = torch.linalg.eigvalsh(kernel / kernel.shape[-1])
    return torch.special.entr(eigenvalues.clamp(min=0)).sum(-1).exp()  # rounding makes a zero slightly negative


def _without(kernel: Tensor, image: int) -> Tensor:
    others = torch.arange(len(kernel)) != image
    return kernel[others][:, others]


def _jackknife(value: Tensor, left_out: Tensor, images: int) -> Estimate:
    """The diversity of one prompt with its jackknife error. Pairs share images, so s/√N would be wrong.

    Args:
        value: diversity of all N images.
        left_out: diversity without one image, for each of the images or for some of them.
        images: N.
    """
    if images == 2:  # one image alone has no diversity
        return Estimate(value.item(), torch.nan)
    variance = (images - 1) * left_out.var(correction=int(len(left_out) < images))
    return Estimate(value.item(), variance.sqrt().item())
