"""Measures a saved base pipeline: what the judges read, in how many images, under which sampler.

    python examples/words/measure_speller.py examples/words/pipeline        # 10 to 25 minutes on one core

Every image is read by PP-OCRv4 and PP-OCRv6, as it comes out of plain `pipe(prompt, …)`.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch
from diffusers import CogView4Pipeline
from drawn import draw, load_pipeline
from judges import exact, font_accuracy, judge_images
from recognisers import character_errors
from sheets import save_grid
from torch import Tensor
from train_speller import PHASES
from word_pictures import FONTS, HELD_OUT_WORDS, NEW_WORDS, TUNED_WORDS, prompt, render_at_random

GROUPS = {"seen, and fine-tuned": TUNED_WORDS, "seen, held out": HELD_OUT_WORDS, "never seen": NEW_WORDS}
MISSPELT_SHARE = PHASES[-1].misspelt
SAMPLERS = (("ODE", 10), ("ODE", 28), ("memoryless", 20))


def describe(images: Tensor, words: list[str], misspelt: float) -> str:
    """One row of the README's table; `misspelt` is the share of words with one wrong letter that were asked for."""
    judged = judge_images(images, words)
    right, errors, letters = [], [], sum(map(len, words))
    for read in (judged.read_v4, judged.read_v6):
        right.append(exact(read, words))
        errors.append(torch.tensor([float(character_errors(a, b)) for a, b in zip(read, words, strict=True)]))
    either = torch.minimum(*errors)  # of each image, as it is read best
    unasked = (either.sum() - misspelt * len(words)) / letters
    shares = torch.bincount(judged.font, minlength=len(FONTS)) / len(words)
    totals = [wrong.sum() / letters for wrong in (*errors, either)]
    numbers = [torch.maximum(*right).mean(), right[0].mean(), right[1].mean(), *totals, unasked]
    fonts = " ".join(f"{share:.2f}" for share in shares)
    return " | ".join(f"{number:.3f}" for number in numbers) + f" | {fonts} | {judged.ink.mean():.3f}"


def measure(folder: Path, count: int, grids: Path | None = None) -> None:
    """Prints the table; draws `count` images of each group of words with each sampler."""
    pipeline, rng = load_pipeline(folder), random.Random(0)
    print(f"the font of {font_accuracy():.3f} of drawn pictures is read right; fonts: {', '.join(FONTS)}")
    print("words | sampler | either | v4 | v6 | errors a letter, v4 | v6 | either | without those asked for | fonts | ink")
    for name, group in GROUPS.items():
        words = [rng.choice(group) for _ in range(count)]
        rendered = torch.stack([render_at_random(word, rng) for word in words])[:, None].expand(-1, 3, -1, -1)
        print(f"{name} | real pictures | {describe(rendered, words, 0.0)}", flush=True)
        for sampler, steps in SAMPLERS:
            images = draw(pipeline, words, sampler, seed=0, steps=steps)
            print(f"{name} | {sampler}, {steps} steps | {describe(images, words, MISSPELT_SHARE)}", flush=True)
            if grids:
                save_grid(images[:64], grids / f"{name}, {sampler} {steps}.png")
    words = [rng.choice(TUNED_WORDS) for _ in range(32)]
    squares = plain_calls(pipeline, words)
    middle = squares[:, :, 16:32]
    print(f"seen | pipe(prompt), all defaults, the middle third | {describe(middle, words, MISSPELT_SHARE)}")
    if grids:
        save_grid(squares, grids / "defaults.png")


@torch.no_grad()
def plain_calls(pipeline: CogView4Pipeline, words: list[str]) -> Tensor:
    """(len(words), 3, 48, 48): 50 steps, guidance 5, squares."""
    return pipeline([prompt(word) for word in words], generator=torch.Generator().manual_seed(0), output_type="pt").images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=500, help="images of each group of words and sampler")
    parser.add_argument("--grids", type=Path, help="existing folder to write sample grids to")
    args = parser.parse_args()
    torch.set_num_threads(1)
    measure(args.folder, args.count, args.grids)


if __name__ == "__main__":
    main()
