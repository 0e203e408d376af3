"""Contact sheets: samples of the same prompts and seeds, the base's above those of the fine-tuned models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from ..pictures.grid import FONT_SIZE, MARGIN

__all__ = ["SheetRow", "contact_sheet"]

LINE, LEAST_WIDTH = FONT_SIZE + 4, 640  # pixels


@dataclass(frozen=True)
class SheetRow:
    """The samples of one prompt and model.

    Args:
        number: number of the prompt.
        prompt: text that is drawn above the first row of a prompt.
        caption: name of the model and its mean rewards.
        strip: its samples, side by side.
    """

    number: int
    prompt: str
    caption: str
    strip: Image.Image


def contact_sheet(title: str, rows: Sequence[SheetRow]) -> Image.Image:
    """An image with all rows below each other, under their captions and prompts."""
    width = max(LEAST_WIDTH, *(row.strip.width + 2 * MARGIN for row in rows))
    placed, y, number = [], LINE + MARGIN, None
    for row in rows:
        is_first = row.number != number
        y += LINE if is_first else 0
        placed.append((y, row, is_first))
        y, number = y + LINE + row.strip.height + MARGIN, row.number
    sheet = Image.new("RGB", (width, y), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(FONT_SIZE)

    def write(top: int, text: str, colour: str = "black") -> None:
        line = text = " ".join(text.split())
        while draw.textlength(line, font) > width - 2 * MARGIN and text:
            text = text[:-1]
            line = f"{text.rstrip()}…"
        draw.text((MARGIN, top), line, fill=colour, font=font)

    write(MARGIN, title)
    for top, row, is_first in placed:
        if is_first:
            write(top - LINE, row.prompt)
        write(top, row.caption, "dimgrey")
        sheet.paste(row.strip, (MARGIN, top + LINE))
    return sheet
