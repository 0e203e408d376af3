"""How much a video moves, and a floor for it: rewards of single images are highest for good pictures that stand still."""

from __future__ import annotations

import math
from numbers import Real

import torch
from torch import Tensor, nn

from .preprocess import check_images, check_tensor

__all__ = ["MotionFloor", "motion"]


def motion(images: Tensor, prompts: list[str] | None = None, frame_numbers: list[list[int]] | None = None) -> Tensor:
    """Root of the frame-difference energy: √mean (x_{f+1} − x_f)² over the pixels and all neighbouring frames.

    Args:
        images: videos (B, F, 3, H, W) in [0, 1], any floating dtype, F ≥ 2.
        prompts: ignored.
        frame_numbers: which frames of the whole video these are, for each of the B, where there are gaps between them: only two
            with following numbers are neighbours. The trainer fills it in (`decode_frames`).

    Returns:
        Shape (B,), in [0, 1], units of the [0, 1] range, float32 or better. A video that stands still has the motion 0, and there
        the gradient is 0, too: nothing says in which direction it should move.

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
            f"the {x.shape[1]} frames of a video have no two neighbours, which have a motion; pass longer videos, or another "
            f"decode_frames."
        )
    kept = steps * neighbours[:, :, None, None, None]
    return torch.linalg.vector_norm(kept.flatten(1), dim=1) / (counts * steps[0, 0].numel()).to(x.dtype).sqrt()


class MotionFloor(nn.Module):
    """min(motion/floor − 1, 0): the missing part of a motion that is enough, beyond which nothing pulls; −1 at a standstill.

    Args:
        floor: motion to keep, as of `motion`, > 0: the mean over videos of the base, or a part of it.

    Raises:
        ValueError: if the floor is not positive and finite.
        TypeError: if it is no number.
    """

    def __init__(self, floor: float) -> None:
        super().__init__()
        if not isinstance(floor, Real):
            raise TypeError(f"floor is {floor!r}; pass a number.")
        if not 0 < floor < math.inf:
            raise ValueError(f"floor={floor} is no motion; pass a number > 0, such as the mean of motion over the base's videos.")
        self.floor: float = float(floor)

    def forward(self, images: Tensor, prompts: list[str] | None = None, frame_numbers: list[list[int]] | None = None) -> Tensor:
        return (motion(images, prompts, frame_numbers) / self.floor - 1).clamp(max=0)

    def asked_frames(self, num_frames: int) -> set[int]:
        """All: neighbours are compared."""
        return set(range(num_frames))
