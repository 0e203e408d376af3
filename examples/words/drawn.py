"""Draws words with a pipeline and says what became of them: exact matches, the reward, the judge, fonts, ink."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import CogView4Pipeline
from judges import BATCH, Judgement, exact, judge_images, read_by_tesseract
from torch import Tensor
from tqdm import tqdm
from word_pictures import FONTS, HEIGHT, WIDTH, prompt

from diffusers_adjoint import memoryless_scheduler
from diffusers_adjoint.metrics import Estimate, TiltReport, TiltShift, tilt_estimate, tilt_shift

PIPELINE = Path(__file__).parent / "pipeline"
SIZE = {"height": HEIGHT, "width": WIDTH}
CALL = SIZE | {"guidance_scale": 1.0, "output_type": "pt"}
STEPS = {"ODE": 28, "memoryless": 10}


def load_pipeline(folder: Path = PIPELINE) -> CogView4Pipeline:
    pipeline = CogView4Pipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def draw(
    pipeline: CogView4Pipeline, words: Sequence[str], sampler: str, seed: int, steps: int | None = None, label: str = ""
) -> Tensor:
    """One image of each word by the pipeline's ordinary call, (len(words), 3, 16, 48) in [0, 1]."""
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
        prompts = [prompt(word) for word in words[start : start + BATCH]]
        found = pipeline(prompts, num_inference_steps=steps or STEPS[sampler], generator=generator, **CALL)
        images.append(found.images)
    return torch.cat(images)


@dataclass(frozen=True)
class Drawn:
    """`per_word` images of each of P words, word after word, and what is said of them."""

    words: tuple[str, ...]
    per_word: int
    images: Tensor
    judged: Judgement

    def asked(self) -> list[str]:
        """The word of each image."""
        return repeated(self.words, self.per_word)

    def statistics(self) -> dict[str, Tensor]:
        """Name → values, (P, per_word)."""
        judged, asked = self.judged, self.asked()
        letters = torch.tensor([float(len(word)) for word in asked])
        found = {
            "log p, v4 (reward), nats": judged.log_prob_v4,
            "log p, v6 (judge), nats": judged.log_prob_v6,
            "exact, v4": exact(judged.read_v4, asked),
            "exact, v6": exact(judged.read_v6, asked),
            "log p v4 − v6 a letter, nats": (judged.log_prob_v4 - judged.log_prob_v6) / letters,
            "ink": judged.ink,
        }
        return {name: values.double().view(len(self.words), self.per_word) for name, values in found.items()}

    def read_by_tesseract(self, per_word: int) -> Tensor:
        """Whether Tesseract reads the word asked for in the first images of each word, (P, per_word)."""
        images = self.images.unflatten(0, (len(self.words), self.per_word))[:, :per_word].flatten(0, 1)
        read = [read_by_tesseract(image) for image in images]
        return exact(read, repeated(self.words, per_word)).double().view(len(self.words), per_word)

    def fonts(self) -> Tensor:
        """Which font each image has, as one number of 0 or 1 a font, (P, per_word, 8)."""
        return torch.nn.functional.one_hot(self.judged.font, len(FONTS)).double().view(len(self.words), self.per_word, -1)


def repeated(words: Sequence[str], per_word: int) -> list[str]:
    return [word for word in words for _ in range(per_word)]


def draw_and_judge(
    pipeline: CogView4Pipeline, words: tuple[str, ...], per_word: int, sampler: str, seed: int, label: str = ""
) -> Drawn:
    images = draw(pipeline, repeated(words, per_word), sampler, seed, label=label)
    return Drawn(words, per_word, images, judge_images(images, repeated(words, per_word)))


def compare(base: Drawn, tuned: Drawn, reward_scale: float, sampler: str) -> TiltReport:
    """Base, fine-tuned and the exact tilt of each word's base, with one weight e^{λr} an image."""
    before, after = base.statistics(), tuned.statistics()
    log_weights = reward_scale * before["log p, v4 (reward), nats"]
    shifts = [tilt_shift(name, sampler, before[name], after[name], log_weights) for name in before]
    return TiltReport(shifts, None)


def font_shares(base: Drawn, tuned: Drawn, reward_scale: float) -> dict[str, Tensor]:
    """Shares of the fonts, (8,) each, of the base, of its tilt and of the fine-tuned model: the mean over words."""
    log_weights = reward_scale * base.statistics()["log p, v4 (reward), nats"]
    target = [tilt_estimate(log_weights, base.fonts()[..., i]).mean for i in range(len(FONTS))]
    return {"base": base.fonts().mean((0, 1)), "target": torch.tensor(target), "tuned": tuned.fonts().mean((0, 1))}


def find_shift(report: TiltReport, statistic: str) -> TiltShift:
    return next(shift for shift in report.shifts if shift.statistic == statistic)


def percent(estimate: Estimate) -> str:
    """`81 ± 2 %`, or one digit more where the error is below half a per cent."""
    digits = 1 if 100 * estimate.standard_error < 0.5 else 0
    return f"{100 * estimate.mean:.{digits}f} ± {100 * estimate.standard_error:.{digits}f} %"
