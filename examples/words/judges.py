"""What is said of an image of a word: what is read in it, in which font it is, how much ink it has."""

from __future__ import annotations

import random
import shutil
import subprocess
from dataclasses import dataclass, fields
from functools import lru_cache
from io import BytesIO

import torch
import torch.nn.functional as F
from PIL import Image
from recognisers import recogniser
from torch import Tensor, nn
from word_pictures import FONTS, NEW_WORDS, draw_word, misspell, render_at_random

BATCH = 64
FONT_UPDATES, FONT_BATCH, FONT_RATE = 300, 64, 5e-3


@dataclass(frozen=True)
class Judgement:
    """Of N images of a word each. A read word is in small letters, without spaces at its ends."""

    read_v4: list[str]
    read_v6: list[str]
    log_prob_v4: Tensor
    """log p(word | image) of PP-OCRv4, the reward, (N,), nats."""
    log_prob_v6: Tensor
    """The same of PP-OCRv6, the judge."""
    font: Tensor
    """Index into `FONTS`, (N,) int64."""
    ink: Tensor
    """Mean darkness, (N,), in [0, 1]."""


@torch.no_grad()
def judge_images(images: Tensor, words: list[str]) -> Judgement:
    """Images (N, 3, 16, 48) in [0, 1], and the word asked for in each."""
    parts = [_judge_batch(batch, words[i * BATCH : (i + 1) * BATCH]) for i, batch in enumerate(images.split(BATCH))]
    return join(parts)


def join(parts: list[Judgement]) -> Judgement:
    found = {}
    for field in fields(Judgement):
        values = [getattr(part, field.name) for part in parts]
        found[field.name] = torch.cat(values) if isinstance(values[0], Tensor) else sum(values, [])
    return Judgement(**found)


def _judge_batch(images: Tensor, words: list[str]) -> Judgement:
    v4, v6 = recogniser("v4"), recogniser("v6")
    seen_v4, seen_v6 = v4(images), v6(images)
    return Judgement(
        read_v4=v4.read(seen_v4),
        read_v6=v6.read(seen_v6),
        log_prob_v4=v4.word_log_prob(seen_v4, words),
        log_prob_v6=v6.word_log_prob(seen_v6, words),
        font=font_reader()(images).argmax(1),
        ink=1 - images.mean((1, 2, 3)),
    )


def exact(read: list[str], words: list[str]) -> Tensor:
    """1 where the word asked for was read, else 0, (N,)."""
    return torch.tensor([float(a == b) for a, b in zip(read, words, strict=True)])


def has_tesseract() -> bool:
    """Whether the program is installed."""
    return shutil.which("tesseract") is not None


def read_by_tesseract(image: Tensor) -> str:
    """One word of small letters in an image (3, H, W) in [0, 1], enlarged fourfold with a white margin, as Tesseract asks for."""
    large = F.interpolate(image.mean(0)[None, None], scale_factor=4, mode="bicubic", align_corners=False)
    pixels = F.pad(large.clamp(0, 1), (16, 16, 16, 16), value=1.0)[0, 0]
    file = BytesIO()
    Image.fromarray((255 * pixels).round().byte().numpy()).save(file, format="png")
    options = ["--psm", "8", "-c", "tessedit_char_whitelist=abcdefghijklmnopqrstuvwxyz"]
    ran = subprocess.run(["tesseract", "stdin", "stdout", *options], input=file.getvalue(), capture_output=True, check=True)
    return ran.stdout.decode().strip()


class FontReader(nn.Module):
    """(B, 3, 16, 48) in [0, 1] → log-probabilities of the fonts (B, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *self.level(1, 24, 5),
            nn.MaxPool2d(2),
            *self.level(24, 48, 3),
            nn.MaxPool2d(2),
            *self.level(48, 96, 3),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(96, len(FONTS)),
        )

    @staticmethod
    def level(channels: int, width: int, size: int) -> list[nn.Module]:
        return [nn.Conv2d(channels, width, size, padding=size // 2), nn.BatchNorm2d(width), nn.ReLU()]

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(1 - 2 * images.mean(1, keepdim=True)).log_softmax(1)


@lru_cache(maxsize=1)
def font_reader() -> FontReader:
    """Trained when it is first needed, on pictures of its own; a quarter of a minute."""
    rng = random.Random(1)
    with torch.enable_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        reader = FontReader()
        optimizer = torch.optim.AdamW(reader.parameters(), lr=FONT_RATE, weight_decay=1e-2)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, FONT_UPDATES)
        for _ in range(FONT_UPDATES):
            loss = F.nll_loss(*_font_batch(reader, rng, FONT_BATCH))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return reader.eval().requires_grad_(False)


def font_accuracy(count: int = 800) -> float:
    """Share of `count` pictures of new words whose font is read right."""
    rng = random.Random(2)
    log_probs, labels = _font_batch(font_reader(), rng, count, words=NEW_WORDS)
    return (log_probs.argmax(1) == labels).float().mean().item()


def _font_batch(reader: FontReader, rng: random.Random, count: int, words: tuple[str, ...] = ()) -> tuple[Tensor, Tensor]:
    labels = [rng.randrange(len(FONTS)) for _ in range(count)]
    texts = [rng.choice(words) if words else misspell(draw_word(rng), rng) for _ in range(count)]
    pictures = [render_at_random(text, rng, font=tuple(FONTS)[i]) for text, i in zip(texts, labels, strict=True)]
    return reader(torch.stack(pictures)[:, None].expand(-1, 3, -1, -1)), torch.tensor(labels)
