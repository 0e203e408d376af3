r"""What a discretisation does to the tilted law: Adjoint Matching solved exactly on the line, without training noise.

    python benchmarks/discretisation.py

**Table 1.** Base ½N(−1, .16) + ½N(1, .16), reward r(x) = x: ã_K = −1 whatever the end point, and the target is a mixture
again. For a chain x' = μ_k(x) + δ_k(x) + s_k ξ the fixed point of the loss is found by one sweep backwards over a grid of x.
With G_K = 1 and G_k(x) = −E[ã_k | x_k = x] under the controlled chain,

    E_k(x) = E_ξ[G_{k+1}(μ_k(x) + δ_k(x) + s_k ξ)],     G_k = μ_k'(x) E_k       (Gauss–Hermite quadrature; inner iteration for δ)

| pairing | control of step k |
|---|---|
| next | δ_k = s_k² E_k: ã_{k+1}, the exact optimum of the chain |
| paper | δ_k = s_k² G_k: ã_k with the step's variance (2409.08861, eq. 42) |
| score | δ_k = (∂μ_k/∂score) G_k: ã_k with the exact coefficient, since the tilted score is s − E[ã_k]; "next" at pure noise |

The change of the mean, divided by the velocity's coefficient, is a change of velocity at the times t_k. Between them it is
interpolated linearly in t, and kept constant after the last. The controlled velocity takes N(0, 1), given by 2000 midpoints
of its quantiles, to t = 1 by 200 Euler steps; W2 is the distance of the sorted points to the target's quantiles. (With 2000
Euler steps the numbers rise by up to .006, since Euler's own error runs against the under-tilt: see `--ode-steps`.)

**Table 2.** Data as narrow as images are, N(1, .05²), no reward: W2 of the chain's noiseless end point μ_{K−1}(x_{K−1}), where
the reward is taken in training, to the data. The chain is affine there, so its law is exact.

Grids: "uniform" is σ_k = s u/(1 + (s − 1)u), u = 1 − k/K, with shift s, as FLUX-like pipelines pass it; "own" is what
diffusers' scheduler makes of K steps, with a nearly empty last one. Everything goes through the product's scheduler.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from diffusers_adjoint.schedulers import MemorylessFlowMatchEulerDiscreteScheduler
from diffusers_adjoint.schedulers.integrators import DEFAULT_INTEGRATOR, INTEGRATORS

WEIGHTS, MEANS, VARIANCE = torch.tensor([0.5, 0.5]).double(), torch.tensor([-1.0, 1.0]).double(), 0.16
AXIS = torch.linspace(-8, 8, 801, dtype=torch.float64)
NODES, NODE_WEIGHTS = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(40))
NODE_WEIGHTS = NODE_WEIGHTS / NODE_WEIGHTS.sum()

GRIDS = [(grid, shift, steps) for grid in ("uniform", "own") for shift in (1.0, 3.0) for steps in (10, 20, 40)]
CASES = [("euler", "paper"), *((name, "next") for name in INTEGRATORS), *((name, "score") for name in INTEGRATORS)]


def make_scheduler(integrator: str, grid: str, shift: float, steps: int) -> MemorylessFlowMatchEulerDiscreteScheduler:
    scheduler = MemorylessFlowMatchEulerDiscreteScheduler(shift=shift, integrator=integrator)
    if grid == "uniform":
        scheduler.set_timesteps(sigmas=[1 - k / steps for k in range(steps)])
    else:
        scheduler.set_timesteps(steps)
    return scheduler


def times(scheduler: MemorylessFlowMatchEulerDiscreteScheduler) -> list[float]:
    """t_0 … t_{K−1}."""
    return (1 - scheduler.sigmas[:-1].double()).tolist()


def base_velocity(x: Tensor, t: float) -> Tensor:
    """E[X_1 − X_0 | X_t = x] of the base."""
    spread = t**2 * VARIANCE + (1 - t) ** 2
    away = x[:, None] - t * MEANS
    responsibility = torch.softmax(WEIGHTS.log() - away**2 / (2 * spread), -1)
    return (responsibility * (MEANS + (t * VARIANCE - (1 - t)) / spread * away)).sum(-1)


def target_quantiles(levels: Tensor) -> Tensor:
    """Of p_base(x) eˣ: the same modes, each moved by its variance and weighted by eᵐ."""
    weights, x = torch.softmax(WEIGHTS.log() + MEANS, 0), torch.linspace(-6, 7, 40001, dtype=torch.float64)
    levels_at_x = (weights * torch.special.ndtr((x[:, None] - MEANS - VARIANCE) / VARIANCE**0.5)).sum(-1)
    return torch.from_numpy(np.interp(levels, levels_at_x, x))


def interpolate(values: Tensor, x: Tensor) -> Tensor:
    """Linear on AXIS; beyond its ends the straight line goes on."""
    position = (x - AXIS[0]) / (AXIS[1] - AXIS[0])
    left = position.long().clamp(0, len(AXIS) - 2)
    return torch.lerp(values[left], values[left + 1], position - left)


def fixed_point(scheduler: MemorylessFlowMatchEulerDiscreteScheduler, pairing: str) -> tuple[Tensor, Tensor]:
    """Times (n,) of the steps with control, and the change of velocity there on AXIS, (n, len(AXIS))."""
    grid_times, carried, found = times(scheduler), torch.ones_like(AXIS), []
    for k in reversed(range(len(grid_times))):
        x = AXIS.clone().requires_grad_()
        step = scheduler.transition(-base_velocity(x, grid_times[k]), x, k)
        slope = torch.autograd.grad(step.mean.sum(), x)[0]
        mean, variance, gain = step.mean.detach(), step.std**2, float(scheduler.score_gains[k])
        if pairing == "score" and gain < float("inf"):
            factor = gain * slope
        else:
            factor = variance * slope if pairing == "paper" else variance
        control, expected = solve_step(carried, mean, step.std, factor)
        carried = slope * expected
        if pairing == "score" or variance > 0:
            found.append((grid_times[k], -control / float(scheduler.table.output[k])))  # the network predicts −v
    found.reverse()
    return torch.tensor([t for t, _ in found]).double(), torch.stack([change for _, change in found])


def solve_step(carried: Tensor, mean: Tensor, std: float, factor: float | Tensor) -> tuple[Tensor, Tensor]:
    """δ = factor · E[carried(mean + δ + std ξ)] and that expectation, on AXIS."""
    control = torch.zeros_like(mean)
    for _ in range(400):
        expected = interpolate(carried, (mean + control)[:, None] + std * NODES) @ NODE_WEIGHTS
        change = factor * expected - control
        if change.abs().max() < 1e-6:
            return control, expected
        control = control + 0.7 * change  # damped: the map can oscillate between two modes
    raise RuntimeError(f"no fixed point after 400 iterations; the last change was {float(change.abs().max()):.1e}.")


def tilt_error(scheduler: MemorylessFlowMatchEulerDiscreteScheduler, pairing: str, ode_steps: int = 200) -> float:
    """W2 between ODE samples of the controlled velocity and the tilted law."""
    control_times, changes = fixed_point(scheduler, pairing)
    levels = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    x = torch.special.ndtri(levels)
    for i in range(ode_steps):
        t = i / ode_steps
        after = int((control_times <= t).sum())  # number of control times up to t; 0 only before a first one past 0
        if 0 < after < len(control_times):
            share = (t - control_times[after - 1]) / (control_times[after] - control_times[after - 1])
            change = torch.lerp(changes[after - 1], changes[after], share)
        else:
            change = changes[max(after - 1, 0)]
        x = x + (base_velocity(x, t) + interpolate(change, x)) / ode_steps
    return float((x.sort().values - target_quantiles(levels)).square().mean().sqrt())


def end_point_error(scheduler: MemorylessFlowMatchEulerDiscreteScheduler, centre: float = 1.0, std: float = 0.05) -> float:
    """W2 between the base chain's noiseless end point and data N(centre, std²)."""
    mean, variance = 0.0, 1.0
    x = torch.tensor([0.0, 1.0], dtype=torch.float64)
    for k, t in enumerate(times(scheduler)):
        spread = t**2 * std**2 + (1 - t) ** 2
        step = scheduler.transition(-(centre + (t * std**2 - (1 - t)) / spread * (x - t * centre)), x, k)
        offset, slope = float(step.mean[0]), float(step.mean[1] - step.mean[0])
        last = k == len(scheduler.stds) - 1
        mean, variance = offset + slope * mean, slope**2 * variance + (0 if last else step.std**2)
    return float(np.hypot(mean - centre, variance**0.5 - std))


def print_table(title: str, rows: Iterable[tuple[str, list[float]]]) -> None:
    print(f"\n{title}\n{'':24}" + "".join(f"| {grid + f', shift {shift:.0f}':20}" for grid, shift, _ in GRIDS[::3]))
    print(f"{'':24}" + "| K=10   K=20   K=40  " * 4)
    for label, values in rows:
        cells = [f"{value:.3f}".lstrip("0") for value in values]
        print(f"{label:24}" + "".join("| " + "".join(f"{c:7}" for c in cells[i : i + 3])[:20] for i in range(0, 12, 3)))


def main() -> None:
    parser = argparse.ArgumentParser(description="Discretisations of the memoryless SDE, measured on a solvable problem.")
    parser.add_argument("--ode-steps", type=int, default=200, help="Euler steps with which the result is sampled")
    ode_steps = parser.parse_args().ode_steps
    torch.set_num_threads(1)  # small tensors: more threads are slower

    errors: dict[tuple[str, str], list[float]] = {case: [] for case in CASES}
    for case, grid in tqdm([(case, grid) for case in CASES for grid in GRIDS], unit="solution"):
        errors[case].append(tilt_error(make_scheduler(case[0], *grid), case[1], ode_steps))
    print_table(
        "Table 1. W2 to the tilted law, by integrator and pairing",
        ((f"{name}, {pairing}" + (" *" if name == DEFAULT_INTEGRATOR else ""), e) for (name, pairing), e in errors.items()),
    )
    print_table(
        "Table 2. W2 of the base's noiseless end point to narrow data",
        ((name, [end_point_error(make_scheduler(name, *grid)) for grid in GRIDS]) for name in INTEGRATORS),
    )
    print(f"\n* the default integrator, {DEFAULT_INTEGRATOR!r}")


if __name__ == "__main__":
    main()
