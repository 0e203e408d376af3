"""Words, fonts and their pictures: black letters on white, 16 × 48 pixels, the whole of the base model's data.

The fonts are the ones inside matplotlib's wheel: DejaVu (Bitstream Vera licence) and STIX (SIL-like STIX licence).
"""

from __future__ import annotations

import random
import string
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from torch import Tensor

HEIGHT, WIDTH = 16, 48
FONTS = {
    "DejaVuSans": 1.0,
    "DejaVuSans-Bold": 1.0,
    "DejaVuSans-Oblique": 1.0,
    "DejaVuSansMono": 1.0,
    "DejaVuSerif": 1.0,
    "DejaVuSerif-Bold": 1.0,
    "STIXGeneral": 1.15,
    "STIXGeneralBolIta": 1.15,
}
"""File name → factor of the size: STIX draws smaller letters than DejaVu."""
RANDOM_SHARE = 0.3  # of strings of 3 to 6 letters: spelling is learnt from them, not a list of words
SUPERSAMPLING = 4
BASELINE = 0.72  # of the height


def prompt(word: str) -> str:
    return f'the word "{word}"'


def word_of(prompt: str) -> str:
    """`the word "seven"` → `seven`.

    Raises:
        ValueError: the prompt has another form.
    """
    start, _, rest = prompt.partition('"')
    if start != "the word " or not rest.endswith('"') or not rest[:-1].isalpha():
        raise ValueError(f"{prompt!r} names no word; write it as 'the word \"seven\"'.")
    return rest[:-1].lower()


def _words(file: str) -> tuple[str, ...]:
    return tuple(map(word_of, (Path(__file__).parent / file).read_text(encoding="utf-8").splitlines()))


TUNED_WORDS = _words("prompts.txt")
"""Words that the base has seen and that are fine-tuned."""
HELD_OUT_WORDS = _words("held_out_prompts.txt")
"""Words that the base has seen and that no fine-tuning prompt contains."""
NEW_WORDS = _words("new_prompts.txt")
"""Words that neither the base nor a fine-tuning prompt has seen."""


def draw_word(rng: random.Random) -> str:
    if rng.random() < RANDOM_SHARE:
        return "".join(rng.choices(string.ascii_lowercase, k=rng.choice((3, 4, 4, 5, 5, 6))))
    return rng.choice(TUNED_WORDS + HELD_OUT_WORDS)


def misspell(word: str, rng: random.Random) -> str:
    """The word with one letter replaced by another."""
    at = rng.randrange(len(word))
    return word[:at] + rng.choice(string.ascii_lowercase.replace(word[at], "")) + word[at + 1 :]


@cache
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf", size)


def render(
    word: str, font: str, size: float, shift: tuple[float, float] = (0.0, 0.0), blur: float = 0.0, height: int = HEIGHT
) -> Tensor:
    """(height, 48) float32 in [0, 1], black on white; `size`, `shift` (right, down) and `blur` in pixels.

    A word that is too wide is drawn smaller.
    """
    face = _font(font, round(size * SUPERSAMPLING))
    while face.getlength(word) > (WIDTH - 2) * SUPERSAMPLING:
        size *= 0.96
        face = _font(font, round(size * SUPERSAMPLING))
    left, _, right, _ = face.getbbox(word)
    x = (WIDTH * SUPERSAMPLING - (right - left)) / 2 - left + shift[0] * SUPERSAMPLING
    y = ((height - HEIGHT) / 2 + HEIGHT * BASELINE + shift[1]) * SUPERSAMPLING
    image = Image.new("L", (WIDTH * SUPERSAMPLING, height * SUPERSAMPLING), 255)
    ImageDraw.Draw(image).text((x, y), word, fill=0, font=face, anchor="ls")
    if blur:
        image = image.filter(ImageFilter.GaussianBlur(blur * SUPERSAMPLING))
    pixels = np.asarray(image, np.float32).reshape(height, SUPERSAMPLING, WIDTH, SUPERSAMPLING)
    return torch.from_numpy(pixels.mean((1, 3)) / 255)


def render_at_random(word: str, rng: random.Random, height: int = HEIGHT, font: str | None = None) -> Tensor:
    """A word in a random font, size, place and sharpness, (height, 48) in [0, 1]."""
    shift = rng.uniform(-1, 1), rng.uniform(-0.7, 0.7)
    font = font or rng.choice(tuple(FONTS))
    return render(word, font, FONTS[font] * rng.uniform(9.9, 12.5), shift, rng.choice((0.0, 0.0, 0.3)), height)
