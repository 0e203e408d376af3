"""The demo's output: a progress bar and a table of the training, and five sentences at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from tqdm import tqdm
from transformers import TrainerCallback

from diffusers_adjoint.metrics import Estimate, TiltReport
from diffusers_adjoint.metrics.table import markdown_table

SHOWN = {
    "reward": "reward",
    "kl": "KL to the base (nats)",
    "loss": "loss",
    "evaluations_per_second": "denoiser evaluations a second",
}
ROWS = 8


class TrainingBar(TrainerCallback):
    """One bar for all updates with the last log line's numbers, instead of `Trainer`'s bar and a line for each update."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar = tqdm(total=state.max_steps, desc="fine-tuning", unit=" updates")

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, float], **kwargs: Any) -> None:
        if "reward" in logs:
            self.bar.set_postfix(reward=f"{logs['reward']:.4f}", kl=f"{logs['kl']:.2f}", refresh=False)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.update()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.close()


def training_table(history: Sequence[Mapping[str, float]]) -> str:
    """A table of some lines of the trainer's log, including the first and the last."""
    lines = [line for line in history if "reward" in line]
    chosen = sorted({round(i * (len(lines) - 1) / max(ROWS - 1, 1)) for i in range(ROWS)})
    rows = [["update", *SHOWN.values()]]
    rows += [[str(lines[i]["step"]), *(f"{lines[i][name]:.4g}" for name in SHOWN)] for i in chosen]
    return markdown_table(rows)


def five_sentences(name: str, report: TiltReport, shares: Mapping[str, Tensor]) -> list[str]:
    """The result in five sentences.

    Args:
        name: of the reward.
        report: with the reward's shift of either sampler.
        shares: digit classes that the referee reads, before, target and after, each (10,).
    """
    ode, memoryless = (_shift(report, sampler) for sampler in ("ODE", "memoryless"))
    worth = round(ode.target.effective_sample_size * ode.target.num_samples)
    away = {state: 0.5 * (shares[state] - shares["target"]).abs().sum().item() for state in ("before", "after")}
    return [
        f"The exact target has a mean {name} of {ode.target}, known from {ode.target.num_samples} images of the base, which "
        f"are worth {worth} of the target.",
        f"The base has {ode.before}, the fine-tuned model {ode.after}, both by the pipeline's ordinary call.",
        f"That is {_percent(ode.fraction)} of the way to the target, and {_percent(memoryless.fraction)} by the memoryless "
        f"sampler that training uses.",
        _nats(report),
        f"The referee, a classifier that is in no reward, reads digits whose shares are {away['after']:.3f} from those of the "
        f"target, after {away['before']:.3f} before (0 is equal, 1 has no digit in common).",
    ]


def _shift(report: TiltReport, sampler: str) -> Any:
    return next(shift for shift in report.shifts if shift.sampler == sampler and shift.statistic.startswith("reward"))


def _percent(share: Estimate | None) -> str:
    return "an unknown part" if share is None else f"{share.mean:.0%} ± {share.standard_error:.0%}"


def _nats(report: TiltReport) -> str:
    gap = report.gap
    if gap is None:
        return "The nats that it went were not measured."
    if gap.kl_target is None or gap.gap is None:
        return f"It went {gap.kl_spent} nats from the base; how many the exact target takes cannot be told."
    return (
        f"It went {gap.kl_spent} nats from the base, where the exact target takes {gap.kl_target}; its paths are {gap.gap} nats "
        f"from those of the target."
    )
