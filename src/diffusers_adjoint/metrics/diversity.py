"""How different images of one prompt are from each other: what a hacked reward loses first."""

from __future__ import annotations

import torch
from torch import Tensor

from .estimate import Estimate, sample_mean

__all__ = ["pairwise_diversity", "vendi_score"]


GROUPS = 30  # of the Vendi score's jackknife


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
    row_sums = _squared_distance_sums(_checked(features))
    images = row_sums.shape[1]
    total = row_sums.sum(1) / 2
    per_prompt = total / (images * (images - 1) / 2)
    if len(per_prompt) > 1:
        return sample_mean(per_prompt)
    return _jackknife(per_prompt[0], (total - row_sums[0]) / ((images - 1) * (images - 2) / 2))


def vendi_score(features: Tensor) -> Estimate:
    """Effective number of different images of one prompt, averaged over prompts (Friedman & Dieng, 2210.02410, Definition 3.1).

    exp(−Σ_i μ_i log μ_i) with the eigenvalues μ of K/N, K_ij = cos(f_i, f_j), per prompt. It grows with N: compare scores of the
    same N only.

    Args:
        features: f, shape (P, N, D), P prompts with N ≥ 2 images each; any floating dtype, computed in float64.

    Returns:
        Estimate in [1, N]: 1 if all images have the same direction, N if all are orthogonal. Its standard error is the spread
        over prompts; with one prompt, the jackknife over its images (NaN for N = 2), in groups where there are more than
        `GROUPS`, since each score takes O(N³).

    Raises:
        ValueError: if the shape is wrong, N < 2, or a feature is not finite or zero.
    """
    f = _checked(features)
    norms = f.norm(dim=2, keepdim=True)
    if not norms.all():
        raise ValueError("features holds a vector of zeros, which has no direction; pass features of non-zero norm.")
    kernel = (f / norms) @ (f / norms).mT
    scores = _effective_number(kernel)
    if len(scores) > 1:
        return sample_mean(scores)
    groups = torch.arange(f.shape[1]).tensor_split(min(f.shape[1], GROUPS))
    return _jackknife(scores[0], torch.stack([_effective_number(_without(kernel[0], group)) for group in groups]))


def _checked(features: Tensor) -> Tensor:
    """As float64 on the CPU."""
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


def _without(kernel: Tensor, images: Tensor) -> Tensor:
    others = torch.ones(len(kernel), dtype=torch.bool).index_fill(0, images, False)
    return kernel[others][:, others]


def _jackknife(value: Tensor, left_out: Tensor) -> Estimate:
    """The diversity of one prompt, with its error from leaving out each image in turn (the images share pairs, so no s/√N)."""
    images = len(left_out)
    if images == 2:  # one image alone has no diversity
        return Estimate(value.item(), torch.nan)
    variance = (images - 1) / images * (left_out - left_out.mean()).square().sum()
    return Estimate(value.item(), variance.sqrt().item())
