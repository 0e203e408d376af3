"""The motion of a video, and a reward that keeps it: with rewards of single frames alone, training tends towards still videos."""

from __future__ import annotations

import math
from numbers import Real

import torch
from torch import Tensor, nn

from .preprocess import check_images, check_tensor

__all__ = ["MotionFloor", "motion"]


def motion(images: Tensor, prompts: list[str] | None = None, frame_numbers: list[list[int]] | None = None) -> Tensor:
    """Motion of a video: the root mean square of x_{f+1} − x_f over all pixels and pairs of neighbouring frames f, f + 1.

    Args:
        images: videos (B, F, 3, H, W) in [0, 1], any floating dtype, F ≥ 2.
        prompts: ignored.
        frame_numbers: for each video, the numbers of these frames in the whole video; only frames with consecutive numbers are
            neighbours. The trainer passes it if it decodes only some frames (`decode_frames`). `None` for all frames.

    Returns:
        Shape (B,), in [0, 1], units of the [0, 1] range, float32 or better. A still video has motion 0 and gradient 0.

    Raises:
        ValueError: if the shape or the range is wrong, or no two frames are neighbours; TypeError if they are not floating.
    """
    check_tensor(images)
    if images.ndim != 5:
        raise ValueError(f"images has shape {tuple(images.shape)}; pass videos (B, F, 3, H, W).")
    check_images(images.flatten(0, 1))
    x = images if images.dtype == torch.float64 else images.float()
    steps = x.diff(dim=1)
    neighbours = torch.ones(steps.shape[:2], dtype=torch.bool, device=x.device)
    if frame_numbers is not None:
        neighbours = torch.tensor(frame_numbers, device=x.device).diff(dim=1) == 1
    counts = neighbours.sum(1)
    if not counts.all():
        raise ValueError(
            f"the {x.shape[1]} frames of a video contain no two neighbouring ones, which motion compares; pass longer videos, or "
            f"another decode_frames."
        )
    kept = steps * neighbours[:, :, None, None, None]
    return torch.linalg.vector_norm(kept.flatten(1), dim=1) / (counts * steps[0, 0].numel()).to(x.dtype).sqrt()


class MotionFloor(nn.Module):
    """The reward min(motion/floor − 1, 0): 0 for videos with enough motion, where its gradient is 0, too, and −1 for a still
    video.

    Args:
        floor: `motion` that is enough, > 0, such as its mean over videos of the base, or a fraction of that.

    Raises:
        ValueError: if the floor is not positive and finite.
        TypeError: if it is not a number.
    """

    def __init__(self, floor: float) -> None:
        super().__init__()
        if not isinstance(floor, Real):
            raise TypeError(f"floor is {floor!r}; pass a number.")
        if not 0 < floor < math.inf:
            raise ValueError(f"floor={floor} is not a motion; pass a number > 0, such as the mean motion of the base's videos.")
        self.floor: float = float(floor)

    def forward(self, images: Tensor, prompts: list[str] | None = None, frame_numbers: list[list[int]] | None = None) -> Tensor:
        return (motion(images, prompts, frame_numbers) / self.floor - 1).clamp(max=0)

    def asked_frames(self, num_frames: int) -> set[int]:
        """All frames, because neighbouring frames are compared."""
        return set(range(num_frames))
