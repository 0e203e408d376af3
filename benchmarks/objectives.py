r"""All objectives with the same number of network evaluations: rows on disk, and tables of them.

    python benchmarks/objectives.py                     # every row that is not recorded yet, then the tables
    python benchmarks/objectives.py --only mixture      # of one problem: mixture, digits-ink, costs, or a data set of the gallery
    python benchmarks/objectives.py --table             # the tables alone
    python benchmarks/objectives.py --short             # the same in a minute, with numbers that mean nothing

Each run is a frozen `Setting`. Its row goes to the end of `recorded/objectives.jsonl` when it is done, and a setting that has a
row is not run again.

**Work** is counted as in `work.py`: evaluations of the network a sample, 1 for a forward, 2 with a vector–Jacobian product to the
state, 3 with a backward pass to the weights. The numbers of updates are such that all runs of a problem have about the same.

**Mixture** (`work_mixture.py`): three Gaussians in the plane and a linear reward. W2 to the tilt, which is known.

**Gallery** (`work_gallery.py`): the three data sets and three rewards of `examples/tilt_2d.py`. Share of the shift of the mean
reward, and W2 to points of the base that are resampled by e^r, both of ODE samples.

**Digits** (`work_digits.py`): the digits pipeline and reward "ink" through the public trainer. Share of the shift.

**Costs**: one update on the digits pipeline with 64 images. How often the reward is called for an image, whether it is
differentiated, the work, and the most memory that torch holds at once beyond what it held before.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent))

import objectives_tables
import work
import work_digits
import work_gallery
import work_mixture
from rows import Row, missing, read, record
from work_memory import peak_memory

HERE = Path(__file__).parent
RECORDED = HERE / "recorded" / "objectives.jsonl"


@dataclass(frozen=True)
class Setting:
    """A run.

    Args:
        problem: "mixture", a data set of the gallery, "digits-ink" or "costs".
        loss_type, loss_kwargs: the objective.
        steps: K, of the paths trained on.
        loss_steps: S.
        updates: of the weights.
        batch: samples of an update; they all have one prompt.
        learning_rate: at its highest.
        seed: of everything that is random in training.
        samples: for the numbers at the end.
    """

    problem: str
    loss_type: str
    loss_kwargs: dict[str, Any] = field(default_factory=dict)
    steps: int = 10
    loss_steps: int = 5
    updates: int = 1
    batch: int = 64
    learning_rate: float = 3e-3
    seed: int = 0
    samples: int = 2000

    per_rollout: ClassVar[int] = 1


OBJECTIVES: dict[str, tuple[str, dict[str, Any]]] = {
    "score": ("adjoint_matching", {"pairing": "score"}),
    "next": ("adjoint_matching", {"pairing": "next"}),
    "basic": ("basic_adjoint_matching", {}),
    "efficient": ("efficient_adjoint_matching", {}),
    "ram": ("ram", {}),
    "plain ram": ("ram", {"mode": "plain"}),
    "one step": ("one_step", {}),
}
"""Name here → `loss_type` and `loss_kwargs`."""

UPDATES = {
    "mixture": {"score": 200, "next": 200, "basic": 141, "efficient": 282, "ram": 218, "plain ram": 194, "one step": 249},
    "gallery": {"score": 200, "next": 202, "basic": 136, "efficient": 334, "ram": 232, "plain ram": 214, "one step": 311},
    "digits-ink": {"score": 45, "next": 45, "basic": 31, "efficient": 61, "ram": 48, "plain ram": 42, "one step": 55},
}
"""As many as have about the work of "score"."""


def settings() -> list[Setting]:
    """Every run of the benchmark, the most important first."""
    return [*mixture(), *costs(), *digits(), *gallery()]


def of_all(setting: Setting, updates: dict[str, int], **changed: Any) -> Iterator[Setting]:
    for name, (loss_type, options) in OBJECTIVES.items():
        yield replace(setting, loss_type=loss_type, loss_kwargs=options, updates=updates[name], **changed)


def mixture() -> Iterator[Setting]:
    like = Setting("mixture", "", steps=20, loss_steps=10, batch=256, learning_rate=1e-2, samples=8192)
    for seed in range(3):
        yield from of_all(like, UPDATES["mixture"], seed=seed)


def digits() -> Iterator[Setting]:
    """But for Adjoint Matching, whose runs are those of `work.py`."""
    for seed in range(3):
        runs = of_all(Setting("digits-ink", ""), UPDATES["digits-ink"], seed=seed)
        yield from (setting for setting in runs if setting.loss_type != "adjoint_matching")


def adjoint_matching_on_digits() -> list[Row]:
    """Rows of `work.py` at the same work."""
    found = []
    for pairing, cap in (("score", 1.2), ("next", None)):
        like = replace(work.INK, pairing=pairing, cap=cap, updates=UPDATES["digits-ink"][pairing])
        for row in read(work.RECORDED):
            if row["setting"] == asdict(replace(like, seed=row["setting"]["seed"])):
                setting = asdict(Setting("digits-ink", "adjoint_matching", {"pairing": pairing}, seed=row["setting"]["seed"]))
                found.append(row | {"setting": setting})
    return found


def gallery() -> Iterator[Setting]:
    for data in work_gallery.tilt_2d.GALLERY:
        like = Setting(data, "", steps=20, loss_steps=5, batch=128, learning_rate=5e-3, samples=10_000)
        for setting in of_all(like, UPDATES["gallery"]):
            # At 5e-3 its paths' cost grows beyond all bounds on these data, and the samples are no numbers.
            yield replace(setting, learning_rate=1e-3) if setting.loss_type == "ram" else setting


def costs() -> Iterator[Setting]:
    yield from of_all(Setting("costs", ""), dict.fromkeys(OBJECTIVES, 1))


def costs_of(setting: Setting) -> dict[str, Any]:
    """One update of the trainer, after the checks before training and one more update that fills what is made once."""
    task, called = work_digits.demo.make_task("ink"), []

    def reward(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        called.append(len(images))
        return task.reward(images, prompts)

    with tempfile.TemporaryDirectory() as folder:
        counted = replace(task, reward=reward)
        trainer = work_digits.make_trainer(replace(setting, updates=2), counted, folder)
        peaks, works = [], []
        step = trainer.training_step

        def measured(*arguments: Any, **options: Any) -> Any:
            called.clear()
            before, losses = trainer.work.total, []
            peaks.append(peak_memory(lambda: losses.append(step(*arguments, **options))))
            works.append(trainer.work.total - before)
            return losses[0]

        trainer.training_step = measured
        trainer.train()
    return {
        "work": works[-1] / setting.batch,
        "rewards": sum(called) / setting.batch,
        "reward_gradient": trainer.method.needs_gradient,
        "peak_bytes": peaks[-1],
    }


RUN: dict[str, Callable[[Any], dict[str, Any]]] = {
    "mixture": work_mixture.run,
    "costs": costs_of,
    "digits-ink": work_digits.run,
    **dict.fromkeys(work_gallery.tilt_2d.GALLERY, work_gallery.run),
}


def shortened(setting: Setting) -> Setting:
    """The same setting with small counts, for a test of seconds."""
    return replace(setting, steps=4, loss_steps=2, updates=min(setting.updates, 2), batch=2, samples=16)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Objectives at equal work; the rows are kept.")
    parser.add_argument("--only", choices=RUN, help="this problem alone")
    parser.add_argument("--rows", type=Path, default=RECORDED, help="file that the rows are kept in")
    parser.add_argument("--table", action="store_true", help="run nothing")
    parser.add_argument("--short", action="store_true", help="tiny counts, numbers that mean nothing; pass --rows, too")
    options = parser.parse_args(arguments)
    if options.short and options.rows == RECORDED:
        parser.error("--short would mix its rows with those recorded; pass --rows FILE, too.")
    torch.set_num_threads(1)  # small tensors: more threads are slower

    wanted = [s for s in settings() if options.only in (None, s.problem)]
    if options.short:
        wanted = [shortened(s) for s in wanted]
    if not options.table:
        for setting in tqdm(missing(wanted, read(options.rows)), unit="run"):
            record(setting, RUN[setting.problem], options.rows)
    print(objectives_tables.tables(adjoint_matching_on_digits() + read(options.rows)))


if __name__ == "__main__":
    main()
