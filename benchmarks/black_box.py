r"""What rewards without a gradient cost and reach: Reinforce Adjoint Matching on problems with a known tilt.

    python benchmarks/black_box.py [--only mixture digits noise dimension] [--seeds 1]

Each row is written to `recorded/black_box.jsonl` when it is found; a row that is there is not computed again. `--table` prints
those that are there.

**mixture.** The map from one model to the next on the line, without chance: ½N(−1, .16) + ½N(1, .16), r(x) = x, the chain
"posterior", uniform grids with shift 1 and 3, the consistency c. E[R | x_{K−1}] and the law of x_{K−1} are carried forwards on a
grid of x; with x_1 = μ_{K−1}^base(x_{K−1}) they give E[(c + R − R̄)(x_1 − x̂_1) | x_k] of the noised end points. In each sweep
each mean goes .3 of the way to what is asked of it; with "tilt_matching" a sweep is a stage and goes all of it. W2 to the tilt by
number of sweeps or stages, sampled as in `discretisation.py`; "deviation" is that of E[R | x_{K−1}].

**digits.** The public trainer on the digits pipeline, reward ink, λ = 40, LoRA r = 8, learning rate 3e-3 falling linearly,
K = 10, S = 5, 48 images an update, in groups of 48 or fewer. Share of the shift of the mean reward by the exact tilt that 1500
samples show, ODE (20 steps) and memoryless (10 steps on "posterior"); the tilt by importance weights on 6000 base samples.

**noise.** Of the gradient of the weights in one update of 48 images: 48 · E‖g − ḡ‖²/‖ḡ‖², the number of images whose gradient
is as much noise as signal, over 12 draws (whose share of the noise is taken off ‖ḡ‖²); for groups of n images, for the scale
s_post of the paths' KL, and for Adjoint Matching; all at the base.

**dimension.** The same of the shifts at one step, without a network: N(0, .36 I) in d dimensions, λr = 1/.6 · x_1, so that its
deviation is 1 whatever d is, at the base; 20 000 paths in one group, K = 10, at t = .5. Adjoint Matching's shifts have no noise
there, because the lean adjoint of a Gaussian and a linear reward is one number.

Work: forward 1, forward with a vector–Jacobian product 2, forward with a backward pass to the weights 3, for each image.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import discretisation as line
import torch
import work_digits
from torch import Tensor
from tqdm import tqdm
from work_count import WorkCount

from diffusers_adjoint import AdjointMatchingConfig, AdjointMatchingTrainer
from diffusers_adjoint.core.matching import LossSteps, regression_loss
from diffusers_adjoint.objectives import AdjointMatching, Ram, Targets

ROOT = Path(__file__).parents[1]
sys.path += [str(ROOT / "tests"), str(ROOT / "examples" / "digits")]

import demo  # noqa: E402
import problems  # noqa: E402
import scheduler_problems as known  # noqa: E402

RECORDED = Path(__file__).parent / "recorded" / "black_box.jsonl"
IMAGES, UPDATES, DRAWS = 48, 35, 12
AXIS = line.AXIS[::4]
MAPS = {"path_corrected": ("path_corrected", 0.3), "consistency .1": ("path_corrected", 0.1)}
MAPS |= {"consistency 1": ("path_corrected", 1.0), "consistency 0": ("path_corrected", 0.0), "plain": ("plain", 0.0)}
ERRORS = {"ODE": line.ode_error, "memoryless": line.memoryless_error}

# ---------------------------------------------------------------------------------------------------------------------- mixture


class LineMap:
    """Changes of the means of all steps on AXIS, and what one update in expectation makes of them."""

    def __init__(self, grid: line.Grid, mode: str, consistency: float = 0.0, stages: int = 1) -> None:
        self.consistency, self.stages = consistency, stages
        self.grid, self.mode, self.scheduler = grid, mode, grid.scheduler("posterior")
        table = self.scheduler.table
        self.levels = [(float(a), float(b)) for a, b in zip(table.alpha, table.beta, strict=True)]
        self.clean = torch.stack([line.BASE.clean(AXIS, *level) for level in self.levels])
        self.base = torch.stack([self.scheduler.toward(clean, AXIS, k) for k, clean in enumerate(self.clean)])
        self.changes = torch.zeros_like(self.base)

    def values(self) -> tuple[Tensor, Tensor]:
        """Law of x_{K−1} and E[R | x_{K−1}] on AXIS."""
        law, costs = torch.softmax(-(AXIS**2) / 2, 0), torch.zeros_like(AXIS)
        for k in range(len(self.levels) - 1):
            std, push = self.scheduler.stds[k], self.changes[k][:, None] / self.scheduler.stds[k]
            noise = (AXIS - (self.base[k] + self.changes[k])[:, None]) / std
            joint = law[:, None] * torch.softmax(-(noise**2) / 2, 1)
            law = joint.sum(0)
            costs = (joint * (costs[:, None] + push * noise + push**2 / 2)).sum(0) / law.clamp(min=1e-300)
        return law, self.ends() / self.stages - (costs if self.mode == "path_corrected" else 0.0)

    def ends(self) -> Tensor:
        """x_1 of each x_{K−1}, the mean of the last step."""
        return self.base[-1] + (self.changes[-1] if self.mode == "tilt_matching" else 0.0)

    def sweep(self, rate: float) -> float:
        """One update of all steps; returns the deviation of E[R | x_{K−1}]."""
        law, values = self.values()
        leads, end = values - (law * values).sum(), self.ends()
        asked, own = torch.empty_like(self.changes), self.predictions()
        for k, (alpha, beta) in enumerate(self.levels):
            distance = (AXIS[:, None] - alpha * end) ** 2 / (2 * beta**2)
            given = torch.softmax(law.clamp(min=1e-300).log() - distance, 1)  # the end point at x_k
            weights = self.consistency + leads
            pull = self.scheduler.toward(given @ (weights * end), AXIS, k) - self.scheduler.toward(
                (given @ weights) * own[k], AXIS, k
            )
            asked[k] = pull - (self.changes[k] if self.mode == "plain" else 0.0)
        self.changes = (self.changes + rate * asked).clamp(-3, 3)  # "plain" runs away where no data are
        return float((law * leads**2).sum().sqrt())

    def predictions(self) -> Tensor:
        """The model's clean predictions on AXIS, (K, len(AXIS))."""
        moved = self.base + self.changes
        return torch.stack([self.scheduler.clean(mean, AXIS, k) for k, mean in enumerate(moved)])

    def solution(self) -> line.Solution:
        """As the other benchmark samples it."""
        betas = torch.tensor([beta for _, beta in self.levels], dtype=torch.float64)
        changes = ((self.predictions() - self.clean) / betas[:, None])[:, None]
        fine = torch.nn.functional.interpolate(changes, len(line.AXIS), mode="linear", align_corners=True)
        return line.Solution(line.BASE, self.grid, fine[:, 0])


def mixture(grid: line.Grid, mode: str, consistency: float) -> dict[str, Any]:
    found, ode, memoryless, deviations = LineMap(grid, mode, consistency), {}, {}, {}
    for sweep in range(1, 81):
        deviation = found.sweep(0.3)
        if sweep in (5, 10, 20, 40, 80):
            ode[sweep] = round(line.ode_error(found.solution()), 4)
            memoryless[sweep] = round(line.memoryless_error(found.solution()), 4)
            deviations[sweep] = round(deviation, 4)
    return {"ODE": ode, "memoryless": memoryless, "deviation": deviations}


def tilt_matching(grid: line.Grid, stages: int) -> dict[str, Any]:
    found = LineMap(grid, "tilt_matching", stages=stages)
    for _ in range(stages):
        found.sweep(1.0)
    return {name: round(error(found.solution()), 4) for name, error in ERRORS.items()}


# ----------------------------------------------------------------------------------------------------------------------- digits


def make_trainer(folder: str, seed: int, updates: int, **options: Any) -> work_digits.CountedTrainer:
    """The trainer of the digits demo, on groups of all images."""
    settings = work_digits.COMMON | {
        "output_dir": folder,
        "reward_scale": 40.0,
        "num_inference_steps": 10,
        "num_loss_steps": 5,
        "num_generations": IMAGES,
        "max_steps": updates,
        "learning_rate": 3e-3,
        "lr_scheduler_type": "linear",
        "logging_steps": 1,
        "seed": seed,
        "num_images_to_log": 0,
    }
    trainer = work_digits.CountedTrainer(
        model=demo.load_pipeline(),
        reward_funcs=demo.ink,
        args=AdjointMatchingConfig(**settings | options),
        train_dataset=[demo.OPEN_PROMPT] * updates * (IMAGES // (settings | options)["num_generations"]),
        peft_config=demo.LoraConfig(r=8, lora_alpha=8, target_modules=demo.LINEAR_LAYERS),
    )
    trainer.work = WorkCount(trainer.denoiser.network)
    return trainer


def base_rewards() -> dict[str, Tensor]:
    """Of the first 6000 of the images that `work.py` draws, and keeps the rewards of."""
    return {name: rewards[:6000] for name, rewards in work_digits.base_rewards(24_000)["ink"].items()}


def shares(trainer: AdjointMatchingTrainer, count: int = 1500) -> dict[str, Any]:
    """Share of the shift by the tilt, of the same seeds as the base's first samples, and the referee's relative error."""
    found = {}
    for name, base in base_rewards().items():
        weights = (40.0 * base.double()).softmax(0)
        target = (weights * base).sum()
        shift = float(target - base.double().mean())
        error = float((weights**2 * (base - target) ** 2).sum().sqrt())
        moved = demo.ink(demo.draw(trainer.pipeline, name, count, 20_000, "tuned"), []).double() - base[:count].double()
        found[name] = round(float(moved.mean()) / shift, 3)
        found[f"{name} error"] = round(float(moved.std()) / count**0.5 / shift, 3)
        found[f"{name} referee"] = round(error / shift, 3)
    return found


def trained(seed: int, **options: Any) -> work_digits.CountedTrainer:
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(folder, seed, options.pop("updates", UPDATES), **options)
        trainer.train()
    return trainer


def digits(seed: int, **options: Any) -> dict[str, Any]:
    trainer = trained(seed, **options)
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    last = {name: round(log[-1][name], 4) for name in ("reward", "kl", "lead", "clipped") if name in log[-1]}
    return {"updates": len(log), "work": trainer.work.total, **shares(trainer), **nats(trainer), **last}


def nats(trainer: AdjointMatchingTrainer) -> dict[str, float]:
    """KL of the memoryless paths to the base's, and log Z − (E[λr] − KL), which is 0 at the tilt."""
    base = base_rewards()["memoryless"]
    tuned = demo.ink(demo.draw(trainer.pipeline, "memoryless", 1500, 20_000, "tuned"), [])
    found = demo.tilt_gap(40.0 * base, 40.0 * tuned, demo.measure_path_kl(trainer, 500, seed=10_000))
    return {
        "KL spent": round(found.kl_spent.mean, 3),
        "gap": round(found.gap.mean, 3),
        "gap error": round(found.gap.standard_error, 3),
    }


# ------------------------------------------------------------------------------------------------------------------------ noise


def gradient(trainer: AdjointMatchingTrainer, method: Any, group: int, draw: int, in_kl: bool) -> Tensor:
    """Of all trained weights, of 48 images in groups; `in_kl` is the scale s_post."""
    trainer.state.global_step = 1000 + draw  # random numbers belong to it
    columns = {"prompt": [demo.OPEN_PROMPT] * IMAGES}
    chain = trainer.prepare_chain({"columns": columns, "first_image": 0, "share": 1.0, "ends_update": False})
    chain = replace(chain, images_per_prompt=group)
    trainer.method = method
    targets: Targets = method.targets(chain, trainer.choose_steps(chain), trainer.scorer(chain))
    trainer.model.zero_grad()
    scales = chain.posterior_stds[list(targets.steps.indices)] if in_kl else targets.scales
    points = zip(targets.steps.indices, targets.states, targets.base_means, targets.shifts, scales, strict=True)
    for k, x, base, shift, scale in points:
        regression_loss(chain.mean(k, x), base, shift, scale).mean().backward()
    return torch.cat([p.grad.flatten() for p in trainer.denoiser.network.parameters() if p.grad is not None])


def noise(method: Any, group: int, in_kl: bool = False) -> dict[str, Any]:
    trainer = noise_trainer(method.integrator(True))
    found = torch.stack([gradient(trainer, method, group, draw, in_kl) for draw in range(DRAWS)]).double()
    spread = found.var(0).sum()
    signal = found.mean(0).square().sum() - spread / DRAWS
    return {"images": round(float(IMAGES * spread / signal), 1), "signal": float(signal), "noise": float(spread)}


@cache
def noise_trainer(integrator: str) -> AdjointMatchingTrainer:
    """Of the base, with paths on this chain."""
    with tempfile.TemporaryDirectory() as folder:
        return make_trainer(folder, 0, 1, loss_type="ram", integrator=integrator)


# -------------------------------------------------------------------------------------------------------------------- dimension


@dataclass(frozen=True)
class Scored:
    exponent: Tensor
    usable: Tensor


def dimension(size: int) -> dict[str, Any]:
    """Noise of δ_k over paths, in units of its signal."""
    scheduler = line.Grid("uniform", 10).scheduler("posterior")
    law = problems.gaussian(torch.zeros(size).double(), 0.36 * torch.eye(size).double())
    chain = known.KnownChain(scheduler, law, torch.randn(20_000, size, generator=torch.Generator().manual_seed(2)).double())

    def score(x: Tensor) -> Scored:
        return Scored(x[:, 0] / 0.6, torch.ones(len(x), dtype=torch.bool))

    shifts = Ram(consistency=0.0).targets(chain, LossSteps((5,), (1.0,)), score).shifts[0]
    signal = shifts.mean(0)[0] ** 2  # the other components are 0 in expectation
    return {"noise / signal of an image": round(float(shifts.var(0).sum() / signal), 2)}


# ------------------------------------------------------------------------------------------------------------------------- rows


def ram(**options: Any) -> dict[str, Any]:
    return {"loss_type": "ram", "loss_kwargs": options}


def rows(seeds: int) -> dict[str, Callable[[], dict[str, Any]]]:
    """Name → what finds it."""
    found: dict[str, Callable[[], dict[str, Any]]] = {}
    for name, (mode, consistency) in MAPS.items():
        for shift in (1.0, 3.0):
            for steps in (10, 20, 40):
                grid = line.Grid("uniform", steps, shift)
                key = f"mixture, {name}, shift {shift:g}, K {steps}"
                found[key] = lambda g=grid, m=mode, c=consistency: mixture(g, m, c)
    for stages in (1, 3, 10, 30):
        for steps in (10, 20, 40):
            grid = line.Grid("uniform", steps)
            found[f"mixture, tilt_matching, {stages} stages, K {steps}"] = lambda g=grid, n=stages: tilt_matching(g, n)
    for size in (1, 16, 64, 256):
        found[f"dimension, d {size}"] = lambda a=size: dimension(a)
    for seed in range(seeds):
        found[f"digits, path_corrected, seed {seed}"] = lambda s=seed: digits(s, **ram())
        found[f"digits, consistency 0, seed {seed}"] = lambda s=seed: digits(s, **ram(consistency=0.0))
    for clip in (5.0, 3.0):
        found[f"digits, consistency 0, clip {clip}, seed 0"] = lambda c=clip: digits(0, **ram(consistency=0.0, clip=c))
    for group in (2, 8):
        options = ram(consistency=0.0) | {"num_generations": group, "per_device_train_batch_size": IMAGES // group}
        found[f"digits, consistency 0, group {group}, seed 0"] = lambda o=options: digits(0, **o)
    for seed in (0, 1):
        options = ram(mode="tilt_matching", stages=5)
        found[f"digits, tilt_matching, 5 stages, seed {seed}"] = lambda s=seed, o=options: digits(s, **o)
    for pairing in ("next", "score"):
        options = {"loss_kwargs": {"pairing": pairing}, "updates": 32}  # at the work of "ram"
        found[f"digits, adjoint_matching, {pairing}, seed 0"] = lambda o=options: digits(0, **o)
    for group in (2, 8, 48):
        found[f"noise, consistency 0, group {group}"] = lambda g=group: noise(Ram(consistency=0.0), g)
    found["noise, consistency 0, group 48, s_post"] = lambda: noise(Ram(consistency=0.0), IMAGES, in_kl=True)
    found["noise, path_corrected, group 48"] = lambda: noise(Ram(), IMAGES)
    found["noise, adjoint_matching, next"] = lambda: noise(AdjointMatching("next"), IMAGES)
    return found


def short(value: float | None, digits: int = 3) -> str:
    """.812 of 0.8123; "–" where there is none."""
    if value is None:
        return "–"
    return "runs away" if abs(value) > 10**4 else f"{value:.{digits}f}".removeprefix("0")


def table(entries: list[dict[str, Any]]) -> list[str]:
    """Lines of the Markdown tables of docs/black_box.md, in the order of the rows."""
    lines = []
    for entry in entries:
        part, _, name = entry["row"].partition(", ")
        name = name.replace(", shift", ", time shift").replace(" 1 stages", " 1 stage")
        if part == "digits":
            numbers = [short(entry.get(key)) for key in ("ODE", "memoryless", "KL spent", "gap", "lead")]
            lines.append(f"| {name} | {entry['work'] / 1000:.1f} | {' | '.join(numbers)} |")
        elif part == "mixture":
            found = [entry[key] if isinstance(entry[key], dict) else {"": entry[key]} for key in ERRORS]
            lines.append(f"| {name} | {' | '.join(' / '.join(map(short, errors.values())) for errors in found)} |")
        elif part == "noise":
            lines.append(f"| {name} | {short(entry['images'], 1)} |")
        else:
            lines.append(f"| {name} | {short(entry['noise / signal of an image'], 1)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description="Reinforce Adjoint Matching on problems with a known tilt.")
    parser.add_argument("--only", nargs="*", default=["mixture", "digits", "noise", "dimension"], help="parts to run")
    parser.add_argument("--seeds", type=int, default=1, help="of the digits runs")
    parser.add_argument("--table", action="store_true", help="print the record's tables and run nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # small tensors: more threads are slower
    lines = RECORDED.read_text(encoding="utf-8").splitlines() if RECORDED.exists() else []
    done = {entry["row"]: entry for entry in map(json.loads, lines)}
    if arguments.table:
        print(*table([done[name] for name in rows(3) if name in done]), sep="\n")
        return
    wanted = {name: find for name, find in rows(arguments.seeds).items() if name.split(",")[0] in arguments.only}
    for name, find in tqdm(wanted.items(), unit="row"):
        if name not in done:
            done[name] = {"row": name, **find()}
            with RECORDED.open("a", encoding="utf-8") as file:
                file.write(json.dumps(done[name]) + "\n")
    for name in wanted:
        print(json.dumps(done[name], ensure_ascii=False))


if __name__ == "__main__":
    main()
