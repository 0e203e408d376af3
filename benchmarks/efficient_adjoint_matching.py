r"""Efficient Adjoint Matching beside Adjoint Matching on the digits: share of the tilt's shift at equal work, rows that are kept.

    python benchmarks/efficient_adjoint_matching.py           # every run that has no row yet, then the table
    python benchmarks/efficient_adjoint_matching.py --table   # the table alone

The demo's pipeline and reward "ink" (`examples/digits/demo.py`), through the public trainer. Each run is a `Setting`; its row
goes to the end of `recorded/efficient_adjoint_matching.jsonl`, and a setting with a row is not run again.

**Share.** (after − before)/(target − before) of the mean reward, for ODE samples (20 steps) and memoryless ones (10), with the
start noise of as many base samples, of which the difference is taken. The target comes from `REFEREE` base samples by importance
weights; its error is common to all rows.

**Work.** Evaluations of the network a sample and update: 1 a forward, 2 with a vector–Jacobian product to the state, 3 with a
backward pass to the weights. Adjoint Matching: K − 1 for the path, 1 + 2(K − 1) for the adjoint at most, 3 S for the loss.
Efficient Adjoint Matching: K for the samples, 1 for the base's score, S for its means, 3 S for the loss.

Two things that the objective does not offer are tried here: samples of weights that lag behind (`lag`), and a reference whose
data have the covariance of the base's own samples (`variance="covariance"`, times `share`): one number an eigenvector.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor

from diffusers_adjoint import AdjointMatchingConfig, AdjointMatchingTrainer, memoryless_scheduler
from diffusers_adjoint.core.matching import LossSteps
from diffusers_adjoint.objectives import EfficientAdjointMatching, Scored, Targets

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples" / "digits"))

import demo  # noqa: E402

RECORDED = Path(__file__).parent / "recorded" / "efficient_adjoint_matching.jsonl"
CACHE = ROOT / "build" / "efficient_adjoint_matching.pt"
"""Of the rewards and latents of base samples, which take minutes to draw and are the same each time."""
REFEREE, SAMPLES, SEED = 6000, 1000, 20_000
TASK = demo.make_task("ink")
ONE_TOKEN = {"max_sequence_length": 1}


@dataclass(frozen=True)
class Setting:
    """A run.

    Args:
        loss_type: of the trainer; pairing: of Adjoint Matching.
        variance: C; "channels" and "covariance" are those of the base's samples, times share.
        noise: of the base's score.
        lag: share of the sampling weights that an update keeps; 0 samples the model itself.
    """

    loss_type: str = "efficient_adjoint_matching"
    pairing: str | None = None
    variance: float | str | None = None
    share: float = 1.0
    noise: float = 0.1
    loss_steps: int = 5
    updates: int = 60
    learning_rate: float = 3e-3
    lag: float = 0.0
    seed: int = 0


def settings() -> list[Setting]:
    """The most wanted first; 115 000 to 120 000 evaluations each."""
    efficient = Setting(variance=0.1)
    adjoint = Setting("adjoint_matching", "score", updates=45)
    return [
        efficient,
        replace(efficient, variance="covariance", share=0.3),
        replace(efficient, variance="channels", lag=0.8),
        replace(efficient, variance="channels"),
        adjoint,
        replace(adjoint, pairing="next"),
        replace(efficient, learning_rate=1e-3),
        replace(efficient, variance=0.3),
        replace(efficient, noise=0.15),
    ]


def work_of(setting: Setting) -> int:
    """Evaluations of a run, all samples."""
    steps, s = demo.STEPS["memoryless"], setting.loss_steps
    efficient = steps + 1 + s + 3 * s
    adjoint = steps - 1 + 1 + 2 * (steps - 1) + 3 * s
    return (efficient if setting.loss_type == "efficient_adjoint_matching" else adjoint) * TASK.images * setting.updates


# ------------------------------------------------------------------------------------------------------------ the base


@cache
def base() -> dict[str, Any]:
    """Rewards of base samples by sampler, and latents of memoryless ones."""
    if not CACHE.exists():
        CACHE.parent.mkdir(parents=True, exist_ok=True)
        pipeline = demo.load_pipeline()
        with torch.no_grad():
            rewards = {s: TASK.reward(demo.draw(pipeline, s, REFEREE, SEED, "base"), []) for s in demo.STEPS}
        torch.save({"rewards": rewards, "latents": draw_latents(pipeline, SAMPLES)}, CACHE)
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


def make_trainer(setting: Setting, folder: str) -> AdjointMatchingTrainer:
    """As the demo's `fine_tune`, with the setting's numbers."""
    options: dict[str, Any] = {"pairing": setting.pairing}
    if setting.loss_type == "efficient_adjoint_matching":
        numbers = setting.share * base()["latents"].transpose(0, 1).flatten(1).var(1)
        variance = numbers.tolist() if setting.variance == "channels" else setting.variance
        options = {"variance": 0.1 if setting.variance == "covariance" else variance, "noise": setting.noise}
    trainer = AdjointMatchingTrainer(
        model=demo.load_pipeline(),
        reward_funcs=TASK.reward,
        args=AdjointMatchingConfig(
            output_dir=folder,
            reward_scale=TASK.reward_scale,
            num_inference_steps=demo.STEPS["memoryless"],
            num_loss_steps=setting.loss_steps,
            num_generations=TASK.images,
            loss_type=setting.loss_type,
            loss_kwargs=options,
            pipeline_kwargs=ONE_TOKEN,
            per_device_train_batch_size=1,
            max_steps=setting.updates,
            learning_rate=setting.learning_rate,
            adam_beta2=0.99,
            max_grad_norm=0.0,
            lr_scheduler_type="linear",
            warmup_steps=5,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            probe_base=False,
            seed=setting.seed,
            use_cpu=True,
        ),
        train_dataset=Dataset.from_dict({"prompt": [demo.OPEN_PROMPT] * setting.updates}),
        peft_config=LoraConfig(r=TASK.rank, lora_alpha=TASK.rank, target_modules=demo.LINEAR_LAYERS),
    )
    if setting.variance == "covariance":
        trainer.method = OfCovariance(trainer.method, torch.cov(base()["latents"].flatten(1).double().T), setting.share)
    if setting.lag:
        trained = [p for p in trainer.denoiser.network.parameters() if p.requires_grad]
        trainer.method = Lagging(trainer.method, trained, setting.lag)
    return trainer


def run(setting: Setting) -> dict[str, Any]:
    """Train, sample, compare with the tilt of the base."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(setting, folder)
        trainer.train()
    found: dict[str, Any] = {"work": work_of(setting)}
    for sampler, before in base()["rewards"].items():
        with torch.no_grad():
            after = TASK.reward(demo.draw(trainer.pipeline, sampler, SAMPLES, SEED, "fine-tuned"), [])
        moved, weights = (after - before[:SAMPLES]).double(), (TASK.reward_scale * before.double()).softmax(0)
        target = weights @ before.double()
        shift = target - before.double().mean()
        error = (weights * (before - target) - (before - before.mean()) / len(before)).norm() / shift
        found[sampler] = {
            "share": float(moved.mean() / shift),
            "error": float(moved.std() / SAMPLES**0.5 / shift),
            "spread": float(after.std() / (weights * (before - target) ** 2).sum().sqrt()),
            "referee": float(error),
        }
    return found


# ------------------------------------------------------------------------------------------------------------ the rows


def rows() -> list[dict[str, Any]]:
    return [json.loads(line) for line in RECORDED.read_text(encoding="utf-8").splitlines()] if RECORDED.exists() else []


def table() -> str:
    lines = ["| run | work | share, ODE | share, memoryless | spread of the reward / the tilt's |", "|---|---|---|---|---|"]
    for row in rows():
        setting = Setting(**row["setting"])
        plain = Setting(setting.loss_type, updates=setting.updates)
        name = ", ".join(f"{k} {v}" for k, v in asdict(setting).items() if v != getattr(plain, k) or k == "loss_type")
        ode, memoryless = (row["found"][sampler] for sampler in demo.STEPS)
        shares = " | ".join(f"{one['share']:.3f} ± {one['error']:.3f}" for one in (ode, memoryless))
        lines.append(f"| {name} | {row['found']['work']:,} | {shares} | {ode['spread']:.2f}, {memoryless['spread']:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Efficient Adjoint Matching on the digits; the rows are kept.")
    parser.add_argument("--table", action="store_true", help="run nothing")
    torch.set_num_threads(1)  # small tensors: more threads are slower
    if not parser.parse_args().table:
        for setting in settings():
            if asdict(setting) not in [row["setting"] for row in rows()]:
                start = time.perf_counter()
                row = {"setting": asdict(setting), "found": run(setting), "seconds": round(time.perf_counter() - start)}
                RECORDED.parent.mkdir(parents=True, exist_ok=True)
                with RECORDED.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
    print(table())


if __name__ == "__main__":
    main()
