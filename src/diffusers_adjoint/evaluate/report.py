"""The report: tables that compare base and fine-tuned models, in the form of tables 2, 5 and 8 of 2409.08861."""

from __future__ import annotations

import csv
import io
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..metrics import Estimate, TiltReport, markdown_table, prompt_difference, prompt_mean, tilt_gap, tilt_shift
from ..metrics.estimate import prompt_differences, prompt_means
from ..metrics.table import escaped
from ..metrics.tilt import MIN_EFFECTIVE_SAMPLES
from ..rewards.combine import total_reward
from .measure import Measured, Setting, mapped
from .models import BASE

__all__ = ["Report", "Row", "Tilt", "make_report", "title_of"]

KL = "KL spent (nats)"
NAMES = ("guidance", "steps", "sampler")
NOTE = "± is one standard error over prompts (over samples for one prompt); differences pair the same seeds."
MARKED_FROM = 10  # prompts; from fewer the standard error is so uncertain that noise would often be marked
MARKED = "* is a difference of more than three of them."
SAMPLERS = {"ode": "ODE", "sde": "memoryless"}


@dataclass(frozen=True)
class Samples:
    """Measurements of one setting and model for all prompts.

    Args:
        rewards: name → (P, N); NaN where a function has no value, infinite where it returned infinity.
        statistics: name → (P, N).
        spread: name → values and standard errors, (P, 2).
        kl: (P, paths), nats.
    """

    rewards: dict[str, Tensor]
    statistics: dict[str, Tensor]
    spread: dict[str, Tensor]
    kl: Tensor

    @classmethod
    def of(cls, prompts: Sequence[Measured]) -> Samples:
        def stacked(kind: str) -> dict[str, Tensor]:
            return {name: _table([getattr(prompt, kind)[name] for prompt in prompts]) for name in getattr(prompts[0], kind)}

        statistics, spread = (
            {name: _known(values) for name, values in stacked(kind).items()} for kind in ("statistics", "spread")
        )
        return cls(stacked("rewards"), statistics, spread, _known(_table([prompt.kl for prompt in prompts])))

    @property
    def known_rewards(self) -> dict[str, Tensor]:
        """The rewards with NaN instead of infinite values."""
        return {name: _known(values) for name, values in self.rewards.items()}

    def estimates(self) -> dict[str, Estimate]:
        """Rewards, diversity and KL, one column of the table each."""
        spread = {name: _over_prompts(values) for name, values in self.spread.items()}
        kl = {KL: prompt_mean(self.kl)} if self.kl.numel() else {}
        return prompt_means(self.known_rewards) | spread | kl

    def row(self, setting: Setting, model: str) -> Row:
        return Row(setting, model, self.estimates(), prompt_means(self.statistics))

    def difference(self, setting: Setting, model: str, base: Samples) -> Row:
        """The difference to the base, paired by prompt and seed."""
        rewards = prompt_differences(base.known_rewards, self.known_rewards)
        statistics = prompt_differences(base.statistics, self.statistics)
        spread = {name: _spread_difference(base.spread[name], values) for name, values in self.spread.items()}
        return Row(setting, f"{model} − {BASE}", rewards | spread, statistics, is_difference=True)


def _over_prompts(values: Tensor) -> Estimate:
    """The mean of (P, 2) values and errors over prompts; for a single prompt, its own value and error."""
    return prompt_mean(values[:, :1]) if len(values) > 1 else Estimate(*values[0].tolist())


def _spread_difference(before: Tensor, after: Tensor) -> Estimate:
    """The difference, paired by prompt. For a single prompt the error is an upper bound: equal seeds are correlated."""
    if len(before) > 1:
        return prompt_difference(before[:, :1], after[:, :1])
    return Estimate((after - before)[0, 0].item(), math.hypot(before[0, 1], after[0, 1]))


def _table(rows: Sequence[Any]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def _known(values: Tensor) -> Tensor:
    return values.where(values.isfinite(), torch.nan)


@dataclass(frozen=True)
class Row:
    """A row of the tables: a setting and a model, or the model's difference to the base.

    Args:
        setting: how the model was sampled.
        model: name of the model.
        metrics: rewards, diversity and KL, by name.
        statistics: image statistics, by name.
        is_difference: whether the row is a difference.
    """

    setting: Setting
    model: str
    metrics: dict[str, Estimate]
    statistics: dict[str, Estimate]
    is_difference: bool = False


@dataclass(frozen=True)
class Tilt:
    """The tilt report of one setting and model; `report` is `None` if a sample has no reward, or prompts have one sample."""

    setting: Setting
    model: str
    report: TiltReport | None

    def to_json(self) -> dict[str, Any]:
        """The report's fields by name, including those of a target that is not estimable."""
        report = None if self.report is None else mapped(asdict(self.report), _or_none)
        return {**_setting(self.setting), "model": self.model, "report": report}


@dataclass(frozen=True)
class Report:
    """The result of an evaluation.

    Args:
        rows: rows of the tables.
        tilts: one for each setting and fine-tuned model; empty without a reward scale.
        prompts: P, number of prompts.
        samples: N, samples of each prompt.
        missing: "<reward or KL> of <model>" → number of values that are not finite, over all settings; only where there are some.
        reward_scale: λ, nats per unit of reward.
    """

    rows: list[Row]
    tilts: list[Tilt]
    prompts: int
    samples: int
    missing: dict[str, int]
    reward_scale: float | None

    def markdown(self) -> str:
        """The tables as Markdown, for the terminal and results.md."""
        settings = list(dict.fromkeys(row.setting for row in self.rows))
        varying = [name for name in NAMES if len({getattr(setting, name) for setting in settings}) > 1]
        constant = "".join(f", {name} {_label(settings[0], name)}" for name in NAMES if name not in varying)
        marks = self.prompts >= MARKED_FROM
        parts = ["## Rewards and diversity", _rendered(self.rows, varying, "metrics", marks)]
        counts = [f"{n} {what}{'s' if n > 1 else ''}" for n, what in ((self.prompts, "prompt"), (self.samples, "sample"))]
        parts.append(f"{' × '.join(counts)}{constant}. {NOTE}" + (f" {MARKED}" if marks else ""))
        if self.missing:
            parts.append("Without a value: " + ", ".join(f"{escaped(name)}, {n} times" for name, n in self.missing.items()) + ".")
        if any(row.statistics for row in self.rows):
            parts += ["## Image statistics", _rendered(self.rows, varying, "statistics", marks)]
        if self.tilts:
            parts.append(f"## Tilt report, λ = {self.reward_scale:g}")
        for tilt in self.tilts:
            text = "not estimable: samples without a reward, or too few of them." if tilt.report is None else tilt.report.format()
            parts += [f"{escaped(tilt.model)}, {title_of(tilt.setting)}", text]
        if any(not shift.target.estimable for tilt in self.tilts if tilt.report for shift in tilt.report.shifts):
            parts.append(
                f"Not estimable: a prompt has fewer than {MIN_EFFECTIVE_SAMPLES} effective samples of the base; draw more with "
                "--num_generations_eval, or take a smaller λ."
            )
        return "\n\n".join(parts) + "\n"

    def json(self) -> str:
        """All numbers as JSON; `null` for those that are missing."""
        rows = [
            {
                **_setting(row.setting),
                "model": row.model,
                "metrics": {name: _plain(value) for name, value in row.metrics.items()},
                "statistics": {name: _plain(value) for name, value in row.statistics.items()},
            }
            for row in self.rows
        ]
        everything: dict[str, Any] = {"prompts": self.prompts, "samples": self.samples, "missing": self.missing, "rows": rows}
        if self.reward_scale is not None:
            everything |= {"reward_scale": self.reward_scale, "tilt": [tilt.to_json() for tilt in self.tilts]}
        return json.dumps(everything, indent=2, allow_nan=False) + "\n"

    def csv(self) -> str:
        """All rows as CSV, each number with its standard error."""
        flat = [row.metrics | {f"image {name}": value for name, value in row.statistics.items()} for row in self.rows]
        names = list(dict.fromkeys(name for values in flat for name in values))
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow([*NAMES, "model", *(column for name in names for column in (name, f"{name} standard error"))])
        for row, values in zip(self.rows, flat, strict=True):
            plain = [_plain(values.get(name, Estimate(math.nan, math.nan))) for name in names]
            writer.writerow([*_setting(row.setting).values(), row.model, *(number for pair in plain for number in pair.values())])
        return text.getvalue()


def make_report(
    results: Sequence[dict[Setting, dict[str, Measured]]],
    *,
    reward_scale: float | None = None,
    weights: dict[str, float] | None = None,
) -> Report:
    """Make the report from the measurements.

    Args:
        results: for each prompt, setting → model's name → measurements; the base first.
        reward_scale: λ, nats per unit of reward; without it there is no tilt report.
        weights: w_i of the rewards in Σ_i w_i f_i; all 1 if not given.
    """
    rows, tilts = [], []
    for setting, models in results[0].items():
        samples = {name: Samples.of([prompt[setting][name] for prompt in results]) for name in models}
        base = samples[BASE]
        rows += [one.row(setting, name) for name, one in samples.items()]
        tuned = {name: one for name, one in samples.items() if name != BASE}
        rows += [one.difference(setting, name, base) for name, one in tuned.items()]
        if reward_scale is not None:
            tilts += [Tilt(setting, name, _tilt(setting, base, one, reward_scale, weights)) for name, one in tuned.items()]
    missing = _missing(results)
    count = len(next(iter(next(iter(results[0].values()))[BASE].rewards.values())))
    return Report(rows, tilts, len(results), count, missing, reward_scale)


def _missing(results: Sequence[dict[Setting, dict[str, Measured]]]) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for models in (models for prompt in results for models in prompt.values()):
        for model, measured in models.items():
            for name, values in measured.rewards.items():
                counts[f"{name} of {model}"] += sum(not math.isfinite(value) for value in values)
            counts[f"{KL} of {model}"] += sum(not math.isfinite(value) for value in measured.kl)
    return dict(+counts)  # the positive ones


def _tilt(setting: Setting, base: Samples, tuned: Samples, scale: float, weights: dict[str, float] | None) -> TiltReport | None:
    weights = {name: w for name, w in (weights or dict.fromkeys(base.rewards, 1.0)).items() if w}
    if not weights:
        return None
    before, after = (total_reward(samples.rewards, weights) for samples in (base, tuned))
    if before.shape[1] < 2 or not (before.isfinite().all() and after.isfinite().all()):
        return None
    pairs = {"reward": (before, after)} | {name: (base.statistics[name], tuned.statistics[name]) for name in base.statistics}
    known = {name: pair for name, pair in pairs.items() if all(values.isfinite().all() for values in pair)}
    sampler = SAMPLERS[setting.sampler]
    shifts = [tilt_shift(name, sampler, *pair, scale * before) for name, pair in known.items()]
    gap = tilt_gap(scale * before, scale * after, tuned.kl) if tuned.kl.numel() and tuned.kl.isfinite().all() else None
    return TiltReport(shifts, gap)


def _label(setting: Setting, name: str) -> str:
    value = getattr(setting, name)
    return SAMPLERS[value] if name == "sampler" else f"{value:g}"


def title_of(setting: Setting) -> str:
    return f"{SAMPLERS[setting.sampler]}, {setting.steps} steps, guidance {setting.guidance:g}"


def _setting(setting: Setting) -> dict[str, Any]:
    return {"guidance": setting.guidance, "steps": setting.steps, "sampler": setting.sampler}


def _rendered(rows: Sequence[Row], varying: Sequence[str], part: str, marks: bool) -> str:
    """A table of the rows' metrics or statistics; only settings that vary have a column."""
    values: list[dict[str, Estimate]] = [getattr(row, part) for row in rows]
    names = list(dict.fromkeys(name for found in values for name in found))
    body = [
        [
            *(_label(row.setting, name) for name in varying),
            escaped(row.model),
            *(_cell(found.get(name), marks and row.is_difference) for name in names),
        ]
        for row, found in zip(rows, values, strict=True)
    ]
    return markdown_table([[*varying, "model", *map(escaped, names)], *body])


def _cell(estimate: Estimate | None, marks: bool) -> str:
    if estimate is None or math.isnan(estimate.mean):
        return "–"
    return f"{estimate} *" if marks and estimate.differs_from_zero else str(estimate)


def _plain(estimate: Estimate) -> dict[str, float | None]:
    return {"mean": _or_none(estimate.mean), "standard_error": _or_none(estimate.standard_error)}


def _or_none(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
