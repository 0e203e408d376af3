"""Changes of plain image statistics by fine-tuning, in which over-optimisation shows first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from .estimate import Estimate, prompt_differences, prompt_means
from .table import markdown_table

__all__ = ["StatisticChange", "StatisticsPanel", "statistics_panel"]


@dataclass(frozen=True)
class StatisticChange:
    """One statistic, before and after.

    Args:
        statistic: its name.
        before: mean over images of the base model.
        after: mean over images of the fine-tuned model.
        difference: after − before, paired by seed, so that its error is usually smaller than those of `before` and `after`.
    """

    statistic: str
    before: Estimate
    after: Estimate
    difference: Estimate


@dataclass(frozen=True)
class StatisticsPanel:
    """The changes of all statistics, as one table."""

    changes: Sequence[StatisticChange]

    def format(self) -> str:
        """The panel as Markdown that also reads well in a terminal; ± is one standard error."""
        header = ["statistic", "base", "fine-tuned", "difference", "> 3 standard errors"]
        return markdown_table([header, *map(_row, self.changes)])


def _row(change: StatisticChange) -> list[str]:
    estimates = [str(change.before), str(change.after), str(change.difference)]
    return [change.statistic, *estimates, "yes" if change.difference.differs_from_zero else ""]


def statistics_panel(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> StatisticsPanel:
    """Compare statistics of images that two models draw from the same prompts and seeds.

    Args:
        before: name → values of the base model's images, shape (P, N) for N images of each of P prompts, NaN where missing.
        after: the same of the fine-tuned model.

    Raises:
        ValueError: if the names or shapes differ, or a value is infinite.
    """
    differences, base, tuned = prompt_differences(before, after), prompt_means(before), prompt_means(after)
    return StatisticsPanel([StatisticChange(name, base[name], tuned[name], change) for name, change in differences.items()])
