"""Draws words with a pipeline and says what became of them: exact matches, the reward, the judge, fonts, ink."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import CogView4Pipeline
from judges import BATCH, Judgement, exact, judge_images, read_by_tesseract
from torch import Tensor
from tqdm import tqdm
from word_pictures import FONTS, HEIGHT, HELD_OUT_WORDS, TUNED_WORDS, WIDTH, prompt

from diffusers_adjoint import memoryless_scheduler
from diffusers_adjoint.metrics import Estimate, TiltEstimate, TiltReport, TiltShift, tilt_shift

PIPELINE = Path(__file__).parent / "pipeline"
SIZE = {"height": HEIGHT, "width": WIDTH}
CALL = SIZE | {"guidance_scale": 1.0, "output_type": "pt"}
STEPS = {"ODE": 28, "memoryless": 10}
GROUPS = {"trained": TUNED_WORDS, "held out": HELD_OUT_WORDS}
# The statistics of an image.
REWARD, JUDGE = "log p, v4 (reward), nats", "log p, v6 (judge), nats"
RIGHT_V4, RIGHT_V6 = "read right by v4", "read right by v6"
GAP, INK = "log p v4 − v6 a letter, nats", "ink"


def load_pipeline(folder: Path = PIPELINE) -> CogView4Pipeline:
    pipeline = CogView4Pipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def draw(
    pipeline: CogView4Pipeline, words: Sequence[str], sampler: str, seed: int, steps: int | None = None, label: str = ""
) -> Tensor:
    """One image of each word by the pipeline's ordinary call, (len(words), 3, 16, 48) in [0, 1].

    The noise of an image depends on `seed` and its place among the words only.
    """
    if sampler == "memoryless":
        pipeline = CogView4Pipeline(
            **pipeline.components | {"scheduler": memoryless_scheduler(pipeline.scheduler, integrator="posterior")}
        )
        pipeline.set_progress_bar_config(disable=True)
    images = []
    starts = range(0, len(words), BATCH)
    for start in tqdm(starts, desc=f"{label}, {sampler}", unit_scale=BATCH, unit=" images", disable=not label):
        generator = torch.Generator().manual_seed(seed + start)
        if sampler == "memoryless":
            pipeline.scheduler.set_generator(generator)  # this pipeline does not pass its generator on to the scheduler
        asked = words[start : start + BATCH]
        # Always a whole batch: with fewer images each would have other noise from its second step on.
        prompts = [prompt(word) for word in (*asked, *[words[0]] * (BATCH - len(asked)))]
        found = pipeline(prompts, num_inference_steps=steps or STEPS[sampler], generator=generator, **CALL)
        images.append(found.images[: len(asked)])
    return torch.cat(images)


@dataclass(frozen=True)
class Drawn:
    """`per_word` images of each of P words, one of each word after another, and what is said of them.

    So the first images are the same, whatever `per_word` is: of one seed, images of base and fine-tuned have the same noise.
    """

    words: tuple[str, ...]
    per_word: int
    images: Tensor
    judged: Judgement

    def asked(self) -> list[str]:
        """The word of each image."""
        return list(self.words) * self.per_word

    def by_word(self, values: Tensor) -> Tensor:
        """One value an image, (P·per_word, …) → (P, per_word, …)."""
        return values.unflatten(0, (self.per_word, len(self.words))).transpose(0, 1)

    def statistics(self) -> dict[str, Tensor]:
        """Name → values, (P, per_word)."""
        judged, asked = self.judged, self.asked()
        letters = torch.tensor([float(len(word)) for word in asked])
        found = {
            REWARD: judged.log_prob_v4,
            JUDGE: judged.log_prob_v6,
            RIGHT_V4: exact(judged.read_v4, asked),
            RIGHT_V6: exact(judged.read_v6, asked),
            GAP: (judged.log_prob_v4 - judged.log_prob_v6) / letters,
            INK: judged.ink,
        }
        return {name: self.by_word(values.double()) for name, values in found.items()}

    def read_by_tesseract(self, per_word: int) -> Tensor:
        """Whether Tesseract reads the word asked for in the first images of each word, (P, per_word)."""
        asked = list(self.words) * per_word
        read = [read_by_tesseract(image) for image in self.images[: len(asked)]]
        return exact(read, asked).double().unflatten(0, (per_word, len(self.words))).T

    def fonts(self) -> Tensor:
        """Which font each image has, as one number of 0 or 1 a font, (P, per_word, 8)."""
        return self.by_word(torch.nn.functional.one_hot(self.judged.font, len(FONTS)).double())


Pictures = dict[tuple[str, str], Drawn]
"""(group of words, sampler) → what was drawn."""


def draw_and_judge(
    pipeline: CogView4Pipeline, words: tuple[str, ...], per_word: int, sampler: str, seed: int, label: str = ""
) -> Drawn:
    asked = list(words) * per_word
    images = draw(pipeline, asked, sampler, seed, label=label)
    return Drawn(words, per_word, images, judge_images(images, asked))


def compare(base: Drawn, tuned: Drawn, reward_scale: float, sampler: str) -> TiltReport:
    """Base, fine-tuned and the exact tilt of each word's base, with one weight e^{λr} an image; both of the same seed."""
    before, after = base.statistics(), tuned.statistics()
    log_weights = reward_scale * before[REWARD]
    shifts = [tilt_shift(name, sampler, before[name], after[name], log_weights, paired=True) for name in before]
    return TiltReport(shifts, None)


SHARES = {"base": "before", "tuned": "after", "target": "target"}


def font_shares(base: Drawn, tuned: Drawn, reward_scale: float) -> dict[str, Tensor]:
    """Shares of the fonts, (8,) each, of the base, the fine-tuned model, and the tilt of the base."""
    before, after, log_weights = base.fonts(), tuned.fonts(), reward_scale * base.statistics()[REWARD]
    shifts = [
        tilt_shift(font, "memoryless", before[..., i], after[..., i], log_weights, paired=True) for i, font in enumerate(FONTS)
    ]
    means = {name: [getattr(shift, when).mean for shift in shifts] for name, when in SHARES.items()}
    return {name: torch.tensor(shares, dtype=torch.float64) for name, shares in means.items()}


def font_distance(shares: Mapping[str, Tensor], name: str) -> float:
    """Half the summed distance of the shares to the target's, 0 to 1."""
    return (shares[name] - shares["target"]).abs().sum().item() / 2


def effective_images(target: TiltEstimate) -> float:
    """As how many samples of the target a word's images of the base count; of the word with the fewest."""
    return target.effective_sample_size * target.num_samples


def find_shift(report: TiltReport, statistic: str) -> TiltShift:
    return next(shift for shift in report.shifts if shift.statistic == statistic)


def percent(estimate: Estimate) -> str:
    """`81 ± 2 %`, or one digit more where the error is below half a per cent."""
    digits = 1 if 100 * estimate.standard_error < 0.5 else 0
    return f"{100 * estimate.mean:.{digits}f} ± {100 * estimate.standard_error:.{digits}f} %"
