"""Contact sheets: the same prompts and seeds, the base above what was fine-tuned from it."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..sample_images import FONT_SIZE, MARGIN, picture

__all__ = ["SheetRow", "contact_sheet", "strip"]

LINE, CELL = FONT_SIZE + 4, 160  # pixels


@dataclass(frozen=True)
class SheetRow:
    """The samples of one prompt and model.

    Args:
        prompt: drawn above the first row of a prompt.
        caption: the model and its numbers.
        strip: its samples, side by side.
    """

    prompt: str
    caption: str
    strip: Image.Image


def strip(images: Tensor) -> Image.Image | None:
    """Samples side by side: images (N, C, H, W), or the middle frames of videos (N, F, C, H, W), C 1 or 3; `None` for sound."""
    if images.ndim not in (4, 5) or images.shape[-3] not in (1, 3):
        return None
    pictures = [picture(image.nan_to_num(0.5, 0.5, 0.5), CELL) for image in images]
    width, height = pictures[0].width + MARGIN, pictures[0].height
    joined = Image.new("RGB", (len(pictures) * width - MARGIN, height), "white")
    for i, one in enumerate(pictures):
        joined.paste(one, (i * width, 0))
    return joined


def contact_sheet(title: str, rows: Sequence[SheetRow]) -> Image.Image:
    """All rows below each other, each under its caption, each prompt under its text."""
    width = max(row.strip.width for row in rows) + 2 * MARGIN
    placed, y, prompt = [], LINE + MARGIN, None
    for row in rows:
        y += LINE if row.prompt != prompt else 0
        placed.append((y, row, row.prompt != prompt))
        y, prompt = y + LINE + row.strip.height + MARGIN, row.prompt
    sheet = Image.new("RGB", (width, y), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(FONT_SIZE)
    characters = max(width // (FONT_SIZE // 2), 8)

    def write(top: int, text: str, colour: str = "black") -> None:
        draw.text((MARGIN, top), textwrap.shorten(text, characters, placeholder="…"), fill=colour, font=font)

    write(MARGIN, title)
    for top, row, is_first in placed:
        if is_first:
            write(top - LINE, row.prompt)
        write(top, row.caption, "dimgrey")
        sheet.paste(row.strip, (MARGIN, top + LINE))
    return sheet
