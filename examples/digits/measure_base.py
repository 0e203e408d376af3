"""Measures a saved base pipeline with the independent referee, through plain `from_pretrained` and plain `pipe(...)`.

    python examples/digits/measure_base.py examples/digits/pipeline        # about two minutes on one core

The referee shares no image with the classifier that a reward may use (data.py).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import diffusers
import torch
from data import DIGIT_PROMPTS, OPEN_PROMPT, digit_images, read_digits, reader_accuracy
from diffusers import StableDiffusion3Pipeline
from pictures import save_grid
from torch import Tensor
from tqdm import tqdm

from diffusers_adjoint.metrics import saturated_share

SHORT = {"guidance_scale": 1.0, "max_sequence_length": 1}  # no guidance, one T5 token: what the demo fine-tunes
SETTINGS = {
    "all defaults": {},
    "no guidance, one T5 token, 10 ODE steps": {**SHORT, "num_inference_steps": 10},
    "no guidance, one T5 token, 28 ODE steps": SHORT,
    "no guidance, 256 T5 tokens, 10 ODE steps": {"guidance_scale": 1.0, "num_inference_steps": 10},
    "guidance 7, one T5 token, 10 ODE steps": {"max_sequence_length": 1, "num_inference_steps": 10},
}


def sample(pipe: StableDiffusion3Pipeline, prompt: str, count: int, seed: int, **settings: object) -> Tensor:
    """`count` images of one prompt, (count, 3, 32, 32) in [0, 1]; all the noise comes from `seed`."""
    generator = torch.Generator().manual_seed(seed)
    batches = [min(100, count - start) for start in range(0, count, 100)]
    call = {"generator": generator, "output_type": "pt", **settings}
    return torch.cat([pipe(prompt, num_images_per_prompt=size, **call).images for size in batches])


def sample_digits(pipe: StableDiffusion3Pipeline, per_digit: int, **settings: object) -> tuple[Tensor, Tensor]:
    """`per_digit` images of each digit prompt, digit after digit, and the digits that their prompts name."""
    images = [sample(pipe, prompt, per_digit, seed=digit, **settings) for digit, prompt in enumerate(DIGIT_PROMPTS)]
    return torch.cat(images), torch.arange(10).repeat_interleave(per_digit)


def describe(images: Tensor) -> str:
    """Ink is the mean intensity of an image; a saturated pixel is exactly 0 or 1, where a reward has no gradient."""
    ink = images.mean((1, 2, 3))
    return f"ink {ink.mean():.4f} ± {ink.std():.4f}, saturated pixels {saturated_share(images).mean():.3f}"


def measure(folder: Path, per_digit: int = 20, open_images: int = 1000, grids: Path | None = None) -> None:
    """Prints the referee's readings for the ten digit prompts under each setting, and the shares under the open prompt."""
    diffusers.utils.logging.set_verbosity_error()  # a text of one token is a truncated text, and each call says so
    pipe = StableDiffusion3Pipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    images, labels = digit_images()
    print(f"real digits: referee right on {reader_accuracy():.4f} of those kept from it; {describe(images)}")
    print("class shares of the real digits:", shares(labels))
    for name, settings in tqdm(SETTINGS.items(), desc="digit prompts"):
        images, labels = sample_digits(pipe, per_digit, **settings)
        right = (read_digits(images) == labels).float()
        tqdm.write(f"{name}: {right.mean():.4f} of {len(labels)} read as asked; {describe(images)}")
        tqdm.write(f"    by digit: {[round(x, 2) for x in right.view(10, -1).mean(1).tolist()]}")
        if grids:
            save_grid(images.view(10, per_digit, 3, 32, 32)[:, :12].flatten(0, 1), grids / f"{name}.png")
    images = sample(pipe, OPEN_PROMPT, open_images, seed=10, num_inference_steps=10, **SHORT)
    print(f"'{OPEN_PROMPT}', {open_images} images, as the demo: shares {shares(read_digits(images))}; {describe(images)}")
    if grids:
        save_grid(images[:144], grids / "open.png")


def shares(labels: Tensor) -> Sequence[float]:
    return [round(x, 3) for x in (torch.bincount(labels, minlength=10) / len(labels)).tolist()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--per-digit", type=int, default=20, help="images of each digit prompt")
    parser.add_argument("--open-images", type=int, default=1000, help="images of the open prompt")
    parser.add_argument("--grids", type=Path, help="existing folder to write sample grids to")
    args = parser.parse_args()
    measure(args.folder, args.per_digit, args.open_images, args.grids)


if __name__ == "__main__":
    main()
