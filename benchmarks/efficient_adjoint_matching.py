r"""Efficient Adjoint Matching on the digits: the effect of its variance, its noise and its steps.

    python benchmarks/efficient_adjoint_matching.py           # every run that has no row yet, then the table
    python benchmarks/efficient_adjoint_matching.py --table   # the table alone

The digits of `objectives.py`, where Adjoint Matching stands beside it at the same work: share of the shift of the mean reward
"ink", by both samplers. Each run is a `Setting`; its row goes to the end of `recorded/efficient_adjoint_matching.jsonl`, and a
setting with a row is not run again.

Two things that the objective does not offer are tried here: samples of weights that lag behind (`lag`), and a reference whose
data have the covariance of the base's own samples (`variance="covariance"`, times `share`): one number an eigenvector.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffusers_adjoint import memoryless_scheduler
from diffusers_adjoint.core.matching import LossSteps
from diffusers_adjoint.objectives import EfficientAdjointMatching, Scored, Targets

sys.path.insert(0, str(Path(__file__).parent))

import work_digits  # noqa: E402
from rows import Row, missing, read, record  # noqa: E402
from work_tables import markdown  # noqa: E402

RECORDED = Path(__file__).parent / "recorded" / "efficient_adjoint_matching.jsonl"
CACHE = work_digits.CACHE / "latents.pt"
"""Of memoryless base samples, which are the same each time."""
LATENTS, SEED = 1000, 20_000
demo = work_digits.demo


@dataclass(frozen=True)
class Setting:
    """A run.

    Args:
        variance: C; "channels" and "covariance" are those of the base's samples, times `share`.
        noise: at which the base is asked for its score.
        lag: share of the sampling weights that an update keeps; 0 samples the model itself.
    """

    variance: float | str = 0.1
    share: float = 1.0
    noise: float = 0.1
    lag: float = 0.0
    loss_steps: int = 5
    updates: int = 61
    learning_rate: float = 3e-3
    seed: int = 0

    problem: ClassVar[str] = "digits-ink"
    loss_type: ClassVar[str] = "efficient_adjoint_matching"
    steps: ClassVar[int] = 10
    batch: ClassVar[int] = 64
    samples: ClassVar[int] = 2000

    @property
    def loss_kwargs(self) -> dict[str, Any]:
        """Of the objective, where it offers the variance."""
        if self.variance == "covariance":
            return {"noise": self.noise}
        variances = (self.share * latents().transpose(0, 1).flatten(1).var(1)).tolist() if self.variance == "channels" else None
        return {"variance": variances or self.variance, "noise": self.noise}


def settings() -> list[Setting]:
    """The most important first; about 120 000 evaluations each."""
    return [
        Setting(),
        Setting(variance="covariance", share=0.3),
        Setting(variance="channels", lag=0.8),
        Setting(variance="channels"),
        Setting(learning_rate=1e-3),
        Setting(variance=0.3),
        Setting(noise=0.15),
    ]


@cache
def latents() -> Tensor:
    """Of memoryless base samples, (LATENTS, C, H, W)."""
    if not CACHE.exists():
        CACHE.parent.mkdir(parents=True, exist_ok=True)
        torch.save(draw_latents(demo.load_pipeline(), LATENTS), CACHE)
    return torch.load(CACHE)


def draw_latents(pipeline: Any, count: int) -> Tensor:
    parts = pipeline.components | {"scheduler": memoryless_scheduler(pipeline.scheduler)}
    pipeline = type(pipeline)(**parts)
    pipeline.scheduler.set_generator(torch.Generator().manual_seed(SEED))
    generator = torch.Generator().manual_seed(SEED)
    call = demo.CALL | {"output_type": "latent", "num_inference_steps": demo.STEPS["memoryless"]}
    return pipeline([demo.OPEN_PROMPT] * count, generator=generator, **call).images


# ---------------------------------------------------------------------------------------------- what the objective lacks


class OfCovariance:
    """`EfficientAdjointMatching` in the eigenvectors of a covariance: states are turned there on the way in, and back."""

    def __init__(self, objective: EfficientAdjointMatching, covariance: Tensor, share: float) -> None:
        values, self.turn = torch.linalg.eigh(covariance)
        self.objective = replace(objective, variance=(share * values.clamp(min=1e-4)).tolist())

    def __getattr__(self, name: str) -> Any:
        return getattr(self.objective, name)

    def targets(self, chain: Any, steps: LossSteps, score: Callable[[Tensor], Scored]) -> Targets:
        there, back = self.there, lambda x: self.back(x, chain.start.shape[1:])

        class Turned:
            def __getattr__(_, name: str) -> Any:
                return getattr(chain, name)

            sample = staticmethod(lambda: there(chain.sample()))
            base_score = staticmethod(lambda x, noise: there(chain.base_score(back(x), noise)))
            base_mean = staticmethod(lambda k, x: there(chain.base_mean(k, back(x))))
            toward = staticmethod(lambda clean, x, k: there(chain.toward(back(clean), back(x), k)))
            noised = staticmethod(lambda clean, k: there(chain.noised(back(clean), k)))

        found = self.objective.targets(Turned(), steps, lambda x: _Turned(score(back(x)), there))
        turned = {name: back(getattr(found, name)) for name in ("states", "shifts", "base_means")}
        return replace(found, scored=found.scored.scored, **turned)

    def there(self, x: Tensor) -> Tensor:
        return x.flatten(-3) @ self.turn.to(x)

    def back(self, x: Tensor, shape: torch.Size) -> Tensor:
        return (x @ self.turn.to(x).T).unflatten(-1, shape)


class _Turned:
    def __init__(self, scored: Any, there: Callable[[Tensor], Tensor]) -> None:
        self.scored, self.exponent, self.usable = scored, scored.exponent, scored.usable
        self.tilt = there(scored.tilt)


class Lagging:
    """An objective whose samples are those of weights that follow the trained ones: w ← lag · w + (1 − lag) · trained."""

    def __init__(self, objective: Any, parameters: list[torch.nn.Parameter], lag: float) -> None:
        self.objective, self.parameters, self.lag = objective, parameters, lag
        self.behind = [p.detach().clone() for p in parameters]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.objective, name)

    def targets(self, chain: Any, steps: LossSteps, score: Callable[[Tensor], Scored]) -> Targets:
        for old, new in zip(self.behind, self.parameters, strict=True):
            old.lerp_(new.detach(), 1 - self.lag)
        with self.exchanged():
            samples = chain.sample()

        class Sampled:
            def __getattr__(_, name: str) -> Any:
                return (lambda: samples) if name == "sample" else getattr(chain, name)

        return self.objective.targets(Sampled(), steps, score)

    @contextmanager
    def exchanged(self) -> Iterator[None]:
        trained = [p.detach().clone() for p in self.parameters]
        with torch.no_grad():
            for parameter, old in zip(self.parameters, self.behind, strict=True):
                parameter.copy_(old)
            yield
            for parameter, new in zip(self.parameters, trained, strict=True):
                parameter.copy_(new)


# -------------------------------------------------------------------------------------------------------------- a run


def run(setting: Setting) -> dict[str, Any]:
    """Train, sample, compare with the tilt of the base."""
    task = demo.make_task("ink")
    with tempfile.TemporaryDirectory() as folder:
        trainer = work_digits.make_trainer(setting, task, folder)
        if setting.variance == "covariance":
            trainer.method = OfCovariance(trainer.method, torch.cov(latents().flatten(1).double().T), setting.share)
        if setting.lag:
            trained = [p for p in trainer.denoiser.network.parameters() if p.requires_grad]
            trainer.method = Lagging(trainer.method, trained, setting.lag)
        trainer.train()
    return {"work": trainer.work.total, **work_digits.measure(trainer, task, setting.samples)}


def table(rows: list[Row]) -> str:
    """A line a run."""
    lines = []
    for row in rows:
        setting, found = row["setting"], row["found"]
        shares = [f"{found['samplers'][sampler]['share']:.3f}" for sampler in demo.STEPS]
        variance = setting["variance"] if setting["share"] == 1 else f"{setting['share']:g} · {setting['variance']}"
        cells = [variance, setting["noise"], setting["lag"], setting["learning_rate"], f"{found['work'] / 1000:.0f}", *shares]
        lines.append([str(cell) for cell in cells])
    heads = ["C", "ε", "lag", "learning rate", "work, 1000", *(f"share, {sampler}" for sampler in demo.STEPS)]
    return markdown(heads, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Efficient Adjoint Matching on the digits; the rows are kept.")
    parser.add_argument("--table", action="store_true", help="run nothing")
    torch.set_num_threads(1)  # small tensors: more threads are slower
    if not parser.parse_args().table:
        for setting in missing(settings(), read(RECORDED)):
            record(setting, run, RECORDED)
    print(table(read(RECORDED)))


if __name__ == "__main__":
    main()
