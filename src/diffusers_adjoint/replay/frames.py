"""Choose the frames of a video that are decoded for the rewards. The choice is made by latent frames, before decoding."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

__all__ = ["ChosenFrames", "FrameChoice", "FrameLayout"]

_WORDS = {"all", "asked", "first"}
_COUNTED = re.compile(r"(random|even)_([1-9][0-9]*)")


@dataclass(frozen=True)
class FrameLayout:
    """How a VAE decodes T latent frames to the F frames of a video.

    Args:
        sizes: number of frames that each latent frame becomes, T values.
        beginnings: numbers n of latent frames, ascending, such that the first n decode alone to the same frames as in the whole
            video. The last one is T, and the only one if the frames depend on later latent frames.
        sliced: whether the VAE calls its decoder for one slice after the other, so that each slice can be checkpointed.
    """

    sizes: tuple[int, ...]
    beginnings: tuple[int, ...]
    sliced: bool

    @property
    def num_frames(self) -> int:
        """F, the number of frames of the video."""
        return sum(self.sizes)

    def frames_of(self, latent_frames: Sequence[int]) -> tuple[int, ...]:
        """Numbers of the frames that these latent frames become, ascending, from 0."""
        ends = list(accumulate(self.sizes))
        return tuple(frame for i in sorted(latent_frames) for frame in range(ends[i] - self.sizes[i], ends[i]))

    def latent_frames_for(self, last: int) -> int:
        """The smallest number of latent frames, from the first, that decodes the frames up to number `last`."""
        ends = list(accumulate(self.sizes))
        return next(count for count in self.beginnings if ends[count - 1] > last)


@dataclass(frozen=True)
class ChosenFrames:
    """The frames of a video that the rewards get.

    Args:
        numbers: numbers of the frames, ascending, from 0.
        of: number of frames of the whole video.
        in_place: if True, the rewards get a video of `of` frames, grey but for these; if False, a video of these frames only.
    """

    numbers: tuple[int, ...]
    of: int
    in_place: bool = False

    def shown(self, frames: Tensor) -> Tensor:
        """The video that the rewards get.

        Args:
            frames: the decoded frames, shape (B, len(numbers), 3, H, W), in [0, 1].

        Returns:
            `frames`, or with `in_place` a video of shape (B, of, 3, H, W), grey (0.5) where no frame was decoded.
        """
        if not self.in_place or len(self.numbers) == self.of:
            return frames
        grey = frames.new_full((len(frames), self.of, *frames.shape[2:]), 0.5)
        return grey.index_copy(1, torch.tensor(self.numbers, device=frames.device), frames)


@dataclass(frozen=True)
class FrameChoice:
    """The parsed option `decode_frames`.

    Args:
        kind: "all", "asked", "first", "random" or "even".
        count: number of latent frames for "random" and "even".
    """

    kind: str
    count: int = 1

    @classmethod
    def of(cls, text: str) -> FrameChoice:
        """Parse "all", "asked", "first", "random_N" or "even_N".

        Raises:
            ValueError: if the text is something else.
        """
        if text in _WORDS:
            return cls(text)
        if found := _COUNTED.fullmatch(text):
            return cls(found[1], int(found[2]))
        raise ValueError(
            f"decode_frames={text!r} is unknown; pass 'all', 'asked', 'first', or 'random_2' or 'even_2' for two latent frames."
        )

    def latent_frames(self, of: int, generator: torch.Generator) -> list[int]:
        """Choose among `of` latent frames.

        "random" draws uniformly without replacement. "even" takes the middles of `count` equal parts. "all" and "asked" take all.

        Args:
            of: number of latent frames of the video.
            generator: source of the random draw, on the CPU.

        Returns:
            Numbers of the chosen latent frames, ascending, from 0; no more than `of`.
        """
        count = min(self.count, of)
        if self.kind == "random":
            return sorted(torch.randperm(of, generator=generator)[:count].tolist())
        if self.kind == "even":
            return [(2 * i + 1) * of // (2 * count) for i in range(count)]
        return [0] if self.kind == "first" else list(range(of))
