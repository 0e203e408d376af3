r"""How near the tilt each kind of matching comes with the same number of network evaluations: rows on disk, and tables of them.

    python benchmarks/work.py                       # every row that is not recorded yet, then the tables
    python benchmarks/work.py --only digits-ink     # of one problem: digits-ink, digits-three, mixture, gradients
    python benchmarks/work.py --table               # the tables alone
    python benchmarks/work.py --short               # the same in a minute, with numbers that mean nothing

Each run is a frozen `Setting`. Its row goes to the end of `recorded/work.jsonl` when it is done, and a setting that has a row is
not run again: stop it whenever you like. A line that was torn by that is run again, too.

**Work.** Evaluations of the network a sample, counted by hooks in training alone: 1 for a forward, 2 with a vector–Jacobian
product to the state, 3 with a backward pass to the weights (`work_count.py`).

**Digits** (`work_digits.py`). The pipeline and the rewards of `examples/digits`, through the public trainer. Share of the shift
that the exact tilt asks for, (after − before)/(target − before), for ODE samples (20 steps) and memoryless ones (10 steps of
`posterior`, whatever was trained); 2000 images with the start noise of as many of the base, of which the difference is taken.
The target comes from the base's own samples by importance weights. Its error is common to all rows, and stands above the table.

**Mixture** (`work_mixture.py`). Three Gaussians in the plane and a linear reward: the tilt is known, W2 is the distance to it.

**Gradients** (`work_gradients.py`). Where the loss looks: the variance of its gradient at a fixed model, for loss steps drawn
uniformly and by p_k ∝ √(mean loss of step k).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent))

import work_digits
import work_gradients
import work_mixture
import work_tables
from rows import missing, read, record

HERE = Path(__file__).parent
RECORDED = HERE / "recorded" / "work.jsonl"


@dataclass(frozen=True)
class Setting:
    """A run.

    Args:
        problem: "digits-ink", "digits-three", "mixture" or "gradients".
        pairing, cap: of `AdjointMatching`; a cap of `None` bounds nothing.
        steps: K, of the paths trained on.
        loss_steps: S.
        updates: of the weights.
        batch: samples of an update.
        learning_rate: at its highest.
        per_rollout: updates that one rollout serves.
        seed: of everything that is random in training.
        samples: for the numbers at the end.
    """

    problem: str
    pairing: str
    cap: float | None
    steps: int
    loss_steps: int
    updates: int
    batch: int
    learning_rate: float
    per_rollout: int = 1
    seed: int = 0
    samples: int = 2000

    loss_type: ClassVar[str] = "adjoint_matching"

    @property
    def loss_kwargs(self) -> dict[str, Any]:
        return {"pairing": self.pairing, "cap": self.cap}


RUN: dict[str, Callable[[Any], dict[str, Any]]] = {
    "digits-ink": work_digits.run,
    "digits-three": work_digits.run,
    "mixture": work_mixture.run,
    "gradients": work_gradients.run,
}

INK = Setting("digits-ink", "next", None, steps=10, loss_steps=5, updates=80, batch=64, learning_rate=3e-3)
"""What the demo was before there was score pairing, and so the unit of work."""
THREE = Setting("digits-three", "next", None, steps=10, loss_steps=5, updates=120, batch=96, learning_rate=6e-3)
MIXTURE = Setting("mixture", "next", None, steps=20, loss_steps=10, updates=200, batch=256, learning_rate=1e-2, samples=8192)


def seeds(setting: Setting, count: int = 3, **changed: Any) -> Iterator[Setting]:
    return (replace(setting, seed=seed, **changed) for seed in range(count))


def score(cap: float | None = 1.2) -> dict[str, Any]:
    return {"pairing": "score", "cap": cap}


def settings() -> list[Setting]:
    """Every run of the benchmark, the most important first."""
    return [*ink(), *three(), *mixture(), *gradients()]


SHORT_CHAIN = {"steps": 7, "loss_steps": 4, "updates": 62}
"""What the demo is with score pairing, at 57 % of the work before."""


def ink() -> Iterator[Setting]:
    """The demo before; pairings, caps and lengths of the chain at 57 % of its work; several updates a rollout."""
    yield from seeds(INK)
    for option in ({"pairing": "next"}, score(1.0), score(1.2), score(1.5)):
        yield from seeds(INK, **option, updates=45)
    yield from seeds(INK, **score(), **SHORT_CHAIN)
    for option in ({"pairing": "next"}, score()):
        for steps, updates in ((5, 90), (20, 22), (40, 11)):
            yield from seeds(INK, **option, steps=steps, loss_steps=(steps + 1) // 2, updates=updates)
    for per_rollout, updates, count in ((1, 50, 3), (2, 70, 3), (2, 88, 1), (3, 102, 1)):
        yield from seeds(INK, count, **score(), **SHORT_CHAIN | {"updates": updates}, per_rollout=per_rollout)


def three() -> Iterator[Setting]:
    """The demo's second reward before score pairing; caps and a shorter chain at no more work."""
    yield from seeds(THREE)
    for cap in (1.0, 1.2, 1.5):
        yield from seeds(THREE, **score(cap))
    yield from seeds(THREE, 1, **score(), steps=5, loss_steps=3, updates=235)


def mixture() -> Iterator[Setting]:
    """Both pairings at equal work, S = K/2; then several updates a rollout, at equal work and at 80 % of it."""
    for option in ({"pairing": "next"}, score()):
        for steps, updates in ((5, 810), (10, 412), (20, 200), (40, 98)):
            yield from seeds(MIXTURE, **option, steps=steps, loss_steps=(steps + 1) // 2, updates=updates)
    for per_rollout, updates in ((2, 295), (3, 350)):
        yield from seeds(MIXTURE, **score(), updates=updates, per_rollout=per_rollout)
    for updates in (597, 478):
        yield from seeds(MIXTURE, **score(), steps=10, loss_steps=5, updates=updates, per_rollout=2)


def gradients() -> list[Setting]:
    """At the base, whose LoRA does nothing yet, and after 20 updates."""
    start = replace(INK, problem="gradients", **score(), updates=0, samples=40)
    return [start, replace(start, updates=20)]


def shortened(setting: Setting) -> Setting:
    """The same setting with small counts, for a test of seconds."""
    return replace(setting, steps=4, loss_steps=2, updates=2, batch=2, samples=16)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Error against work; the rows are kept.")
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
    print(work_tables.tables(read(options.rows)))


if __name__ == "__main__":
    main()
