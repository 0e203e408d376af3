"""Which frames of a video are decoded for the rewards: chosen by latent frames, before anything is decoded."""

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
    """How a VAE makes frames of latent frames.

    Args:
        sizes: how many frames each of the T latent frames becomes.
        beginnings: of how many latent frames, ascending, a decoding of these alone has the same frames as that of all; T is the
            last. Where a frame depends on later latent frames there is no other.
        sliced: whether the decoder is called for one part after the other, so that it can be evaluated again part by part.
    """

    sizes: tuple[int, ...]
    beginnings: tuple[int, ...]
    sliced: bool

    @property
    def num_frames(self) -> int:
        return sum(self.sizes)

    def frames_of(self, latent_frames: Sequence[int]) -> tuple[int, ...]:
        """Numbers of the frames that these latent frames become, ascending."""
        ends = list(accumulate(self.sizes))
        return tuple(frame for i in sorted(latent_frames) for frame in range(ends[i] - self.sizes[i], ends[i]))

    def latent_frames_for(self, last: int) -> int:
        """How many latent frames are to be decoded for the frames up to number `last`."""
        ends = list(accumulate(self.sizes))
        return next(count for count in self.beginnings if ends[count - 1] > last)


@dataclass(frozen=True)
class ChosenFrames:
    """Frames of a video of `of` frames.

    Args:
        numbers: ascending.
        in_place: whether they are given where they are in the whole video, which is grey elsewhere, and not as a shorter video.
    """

    numbers: tuple[int, ...]
    of: int
    in_place: bool = False

    def shown(self, frames: Tensor) -> Tensor:
        """(B, len(numbers), 3, H, W) as it is, or in place: (B, of, 3, H, W)."""
        if not self.in_place or len(self.numbers) == self.of:
            return frames
        grey = frames.new_full((len(frames), self.of, *frames.shape[2:]), 0.5)
        return grey.index_copy(1, torch.tensor(self.numbers, device=frames.device), frames)


@dataclass(frozen=True)
class FrameChoice:
    """What `decode_frames` says: `kind` "all", "asked", "first", "random" or "even", the last two of `count` latent frames."""

    kind: str
    count: int = 1

    @classmethod
    def of(cls, text: str) -> FrameChoice:
        """Parse the text; raise ValueError if it is not one of these choices."""
        if text in _WORDS:
            return cls(text)
        if found := _COUNTED.fullmatch(text):
            return cls(found[1], int(found[2]))
        raise ValueError(
            f"decode_frames={text!r} is unknown; pass 'all', 'asked', 'first', or 'random_2' or 'even_2' for two latent frames."
        )

    def latent_frames(self, of: int, generator: torch.Generator) -> list[int]:
        """Numbers of the chosen ones of `of` latent frames; the random ones are drawn without repetition, each as likely.

        Evenly spaced ones are the middles of `count` equal parts.
        """
        count = min(self.count, of)
        if self.kind == "random":
            return sorted(torch.randperm(of, generator=generator)[:count].tolist())
        if self.kind == "even":
            return [(2 * i + 1) * of // (2 * count) for i in range(count)]
        return [0] if self.kind == "first" else list(range(of))
