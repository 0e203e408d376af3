r"""Memory and time that `decode_frames` saves in the reward phase of a video, as shares of those for all frames.

    python benchmarks/video_memory.py               # every row that is not recorded yet, then the table
    python benchmarks/video_memory.py --table       # the table alone

A row is a decoder of a real class with the published depth and a sixteenth of its width, weights at random, and in it every
choice, one after the other in one process; it goes to the end of `recorded/video_memory.jsonl`. The phase is what training does
at an end point: decode, score, differentiate down to the latents (`reward_gradient`). The reward is a small network of
convolutions, its mean over the frames that it gets.

- **Peak**: the most that torch holds at once during the phase beyond what it held before, counted from its allocations. The
  resident memory of the process is no measure at this size: it follows the C library's allocator.
- **Time**: of the processor, which other work on the machine does not lengthen as it does the clock's; median of three.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLCogVideoX, AutoencoderKLLTXVideo, AutoencoderKLWan, ModelMixin
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent))

from rows import Row, missing, read, record
from work_memory import peak_memory

from diffusers_adjoint.metrics import markdown_table
from diffusers_adjoint.replay.frames import FrameChoice, FrameLayout
from diffusers_adjoint.replay.slices import decoding, measuring
from diffusers_adjoint.rewards import WeightedReward, reward_gradient

RECORDED = Path(__file__).parent / "recorded" / "video_memory.jsonl"
EVERY = "every frame, by slices"
BLOCKS = "all, blocks evaluated again"
PLAIN = "all"
CHOICES = (PLAIN, EVERY, "first", "even_1", "even_2", "random_2")
DRAWS = 2  # of a random choice, whose means are recorded


@dataclass(frozen=True)
class Setting:
    """A decoder, its video (latent frames, height and width of the latents), and how often the time is taken."""

    decoder: str
    latent_frames: int
    size: int
    repeats: int = 3


def settings() -> list[Setting]:
    """49 frames of 16 × 16 pixels, of LTX, whose latents are coarser, 32 × 32."""
    return [Setting("CogVideoX", 13, 2), Setting("Wan", 13, 2), Setting("LTX", 7, 1)]


def cogvideox() -> ModelMixin:
    return AutoencoderKLCogVideoX(block_out_channels=(8, 16, 16, 32), norm_num_groups=8, layers_per_block=3, latent_channels=16)


def wan() -> ModelMixin:
    return AutoencoderKLWan(base_dim=6, z_dim=16)


def ltx() -> ModelMixin:
    return AutoencoderKLLTXVideo(
        latent_channels=16, block_out_channels=(8, 16, 32, 32), decoder_block_out_channels=(8, 16, 32, 32)
    )


DECODERS: dict[str, Callable[[], ModelMixin]] = {"CogVideoX": cogvideox, "Wan": wan, "LTX": ltx}


class Reward(nn.Module):
    """Mean over the frames of a small network's value."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Conv2d(3, 16, 4, 4), nn.SiLU(), nn.Conv2d(16, 32, 3, padding=1), nn.SiLU())

    def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
        return self.network(images.flatten(0, 1)).square().mean((1, 2, 3)).view(images.shape[:2]).mean(1)


@dataclass
class Phase:
    """The reward phase of one video."""

    vae: Any
    z: Tensor
    layout: FrameLayout
    reward: WeightedReward

    @classmethod
    def of(cls, setting: Setting) -> Phase:
        torch.manual_seed(0)
        vae: Any = DECODERS[setting.decoder]().eval().requires_grad_(False)
        z = torch.randn(1, 16, setting.latent_frames, setting.size, setting.size)
        found: list[FrameLayout] = []
        with torch.no_grad():
            measuring(setting.decoder, found)(vae)(z)
        return cls(vae, z, found[0], WeightedReward(Reward()))

    def choices(self) -> list[str]:
        return [*CHOICES, *([BLOCKS] if self.vae._supports_gradient_checkpointing else [])]

    def draws(self, choice: str) -> list[list[int]]:
        """The latent frames of each time that a choice is measured."""
        count = len(self.layout.sizes)
        if choice in (PLAIN, EVERY, BLOCKS):
            return [list(range(count))]
        chosen = FrameChoice.of(choice)
        times = DRAWS if chosen.kind == "random" else 1
        return [chosen.latent_frames(count, torch.Generator().manual_seed(seed)) for seed in range(times)]

    def decode(self, choice: str, latent_frames: list[int]) -> Callable[[Tensor], Tensor]:
        whole = choice in (PLAIN, BLOCKS)
        own = self.vae.decode if whole else decoding(self.layout, self.layout.frames_of(latent_frames))(self.vae)
        return lambda z: (own(z).sample.movedim(2, 1) / 2 + 0.5).clamp(0, 1)

    def gradient(self, choice: str, latent_frames: list[int]) -> Tensor:
        self.vae.disable_gradient_checkpointing()
        if choice == BLOCKS:
            self.vae.enable_gradient_checkpointing()
        return reward_gradient(self.z, self.decode(choice, latent_frames), self.reward, [""], {}).gradient


def run(setting: Setting) -> dict[str, Any]:
    phase, found = Phase.of(setting), {}
    for choice in tqdm(phase.choices(), setting.decoder, leave=False):
        measured = [_measured(phase, choice, chosen, setting.repeats) for chosen in phase.draws(choice)]
        found[choice] = {name: statistics.fmean(one[name] for one in measured) for name in measured[0]}
    return found


def _measured(phase: Phase, choice: str, chosen: list[int], repeats: int) -> dict[str, float]:
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        phase.gradient(choice, chosen)
        seconds.append(time.process_time() - start)
    return {
        "seconds": statistics.median(seconds),
        "peak": peak_memory(lambda: phase.gradient(choice, chosen)),
    }


def table(rows: Sequence[Row]) -> str:
    cells = [["decoder", "`decode_frames`", "peak", "time"]]
    for row in rows:
        found = row["found"]
        for choice, measured in found.items():
            shares = [f"{measured[name] / found[PLAIN][name]:.2f}" for name in ("peak", "seconds")]
            if choice == PLAIN:
                shares = [f"{measured['peak'] / 2**20:.0f} MiB", f"{measured['seconds']:.2f} s"]
            named = choice if choice in (EVERY, BLOCKS) else f"`{choice}`"
            cells.append([row["setting"]["decoder"], named, *shares])
    return markdown_table(cells)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="What a choice of frames spares; the rows are kept.")
    parser.add_argument("--table", action="store_true", help="run nothing")
    parser.add_argument("--rows", type=Path, default=RECORDED, help="the file of the rows")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    for setting in tqdm([] if options.table else missing(settings(), read(options.rows)), unit="row"):
        record(setting, run, options.rows)
    print(table(read(options.rows)))


if __name__ == "__main__":
    main()
