"""The method against the closed forms of continuous time, through the real schedulers, in float64: right up to O(1/K).

The network is the exact one, so nothing but the step size is left; most tests check that halving it halves the error.
"""

from __future__ import annotations

import math

import pytest
import torch
from adjoints import lean_from_end
from problems import AffineChain, GaussianMixture, QuadraticReward, gaussian, mixture_1d
from samplers import (
    BIMODAL,
    EXACT,
    FAMILIES,
    LINEAR,
    NORMAL,
    QUADRATIC,
    Sampler,
    constant_noise,
    ddim,
    draw,
    memoryless,
    parent_of,
    tensor,
)
from torch import Tensor

from diffusers_adjoint.core.adjoint import lean_adjoint
from diffusers_adjoint.core.matching import matching_loss, step_kl
from diffusers_adjoint.core.trajectory import rollout
from diffusers_adjoint.schedulers.integrators import INTEGRATORS


def carried_slope(law: GaussianMixture, sampler: Sampler) -> Tensor:
    """Φ(t_k) = α C S⁻¹ of a normal law, (K + 1, d, d): how E[X_1 | X_t = x] moves with x."""
    covariance, eye = law.covariances[0], torch.eye(law.means.shape[1], dtype=torch.float64)
    levels = zip(sampler.alphas, sampler.betas, strict=True)
    return torch.stack([a * covariance @ torch.linalg.inv(a**2 * covariance + b**2 * eye) for a, b in levels])


def continuous_errors(prediction: str, integrator: str, steps: int) -> dict[str, float]:
    """How far a grid is from the closed forms of continuous time; every entry vanishes as K → ∞."""
    sampler = Sampler.of(prediction, integrator, steps)
    base, chain, x = sampler.mean(NORMAL), sampler.chain(NORMAL), draw(8, 2, seed=3)
    path = sampler.path(base, x, seed=4)
    lean = lean_from_end(base, path, lambda end: -LINEAR.grad(end))
    linear, quadratic = NORMAL.tilt(LINEAR)[0], NORMAL.tilt(QUADRATIC)[0]
    riccati, tilted = chain.controlled(*chain.optimal_control(QUADRATIC)).mean, sampler.mean(quadratic)
    loss = gap = tensor(0.0)
    for k in sampler.noisy_steps():
        at, std = path.states[k], sampler.stds[k]
        loss = loss + matching_loss(sampler.mean(linear)(k, at), lean.base_means[k], std, lean.adjoints[k + 1]).mean()
        gap = gap + step_kl(riccati(k, at), tilted(k, at), std).mean()
    carried = carried_slope(NORMAL, sampler)
    memory = carried[0] @ carried[0].T  # what x_0 ~ N(0, I) still contributes to Var(x_K)
    errors = {
        "T1 adjoint": lean.adjoints[:, 0] + carried @ LINEAR.slope,
        "T1 loss at u*": loss,
        "T2 KL from the Riccati control to u*": gap,
        "memory": chain.terminal_law(x[0]).covariance() - (NORMAL.covariance() - memory),
    }
    for name, law in (("base", NORMAL), ("linear", linear), ("quadratic", quadratic)):
        reached = sampler.chain(law).terminal_law(*standard_start())
        errors[f"{name} mean"], errors[f"{name} covariance"] = (
            reached.mean() - law.mean(),
            reached.covariance() - law.covariance(),
        )
    return {name: float(error.abs().max()) for name, error in errors.items()}


def standard_start() -> tuple[Tensor, Tensor]:
    return torch.zeros(2, dtype=torch.float64), torch.eye(2, dtype=torch.float64)


@pytest.mark.parametrize("integrator", INTEGRATORS)
@pytest.mark.parametrize("prediction", ["flow_prediction", "epsilon", "v_prediction"])
def test_the_grid_converges_to_the_closed_forms_of_continuous_time(prediction, integrator):
    coarse, fine = (continuous_errors(prediction, integrator, steps) for steps in (60, 120))
    for name in fine:
        # First order or better: half the step, half the error (.5; up to .70 where the next order still shows: it was .59
        # from 120 to 240 steps there). Errors below 1e-4 have no order to show: some are rounding, some come from
        # the α_0 = .0064 with which the β-schedule starts.
        assert fine[name] < max(0.72 * coarse[name], 1e-4), (name, coarse[name], fine[name])
        assert fine[name] < 0.1, (name, fine[name])


@pytest.mark.parametrize("integrator", ["ancestral", "posterior"])
@pytest.mark.parametrize("prediction", FAMILIES)
def test_integrators_with_the_exact_mean_carry_the_adjoint_exactly(prediction, integrator):
    """T1 without a step-size error: E[X_{k+1} | x_k] composes, so ã_k = −Φ(t_k) c on the coarsest grid."""
    sampler = Sampler.of(prediction, integrator, 4)
    mean = sampler.mean(NORMAL)
    lean = lean_from_end(mean, sampler.path(mean, draw(1, 2, seed=1), seed=2), lambda end: -LINEAR.grad(end))
    carried = carried_slope(NORMAL, sampler)
    # The closed form starts from X_1 itself; a β-schedule ends at α_K = 1, up to its float32 table.
    torch.testing.assert_close(lean.adjoints[:, 0], -carried @ LINEAR.slope, atol=1e-6, rtol=0)


def test_the_posterior_integrator_is_exact_for_unit_normal_data():
    """Four steps reach N(m, I), and steered by the adjoint its linear tilt N(m + c, I)."""
    law = gaussian(tensor([0.7, -0.4]), torch.eye(2, dtype=torch.float64))
    sampler = Sampler.of("flow_prediction", "posterior", 4)
    chain = sampler.chain(law)
    for steered, target in ((chain, law), (chain.controlled(*chain.optimal_control(LINEAR)), law.tilt(LINEAR)[0])):
        reached = steered.terminal_law(*standard_start())
        torch.testing.assert_close(reached.mean(), target.mean(), **EXACT)
        torch.testing.assert_close(reached.covariance(), target.covariance(), **EXACT)


@pytest.mark.parametrize("reward", [LINEAR, QUADRATIC])
@pytest.mark.parametrize("prediction", FAMILIES)
def test_the_optimal_network_samples_the_tilt_without_noise_too(prediction, reward):
    """Theorem 1: what the memoryless process learned serves the parent's deterministic sampler as it is."""
    steps = 500  # divides the β-schedule's 1000: only then does diffusers' own DDIM step from grid point to grid point
    scheduler = memoryless(prediction, "posterior", steps)
    sampler, target = Sampler.over(scheduler), NORMAL.tilt(reward)[0]
    parent = parent_of(scheduler)
    assert torch.equal(parent.timesteps, sampler.timesteps)

    def deterministic(k: int, x: Tensor) -> Tensor:
        return parent.step(sampler.output(target, k, x), parent.timesteps[k], x).prev_sample

    reached = AffineChain.of(deterministic, torch.zeros(steps, dtype=torch.float64), 2).terminal_law(*standard_start())
    # First-order sampler, 500 steps: 5e-3 was the worst; the base is .3 and more away.
    torch.testing.assert_close(reached.mean(), target.mean(), atol=1e-2, rtol=0)
    torch.testing.assert_close(reached.covariance(), target.covariance(), atol=1e-2, rtol=0)
    assert (NORMAL.mean() - target.mean()).abs().max() > 0.3


def memory(rho: float, start: float, variance: float) -> float:
    """T6: Cov(X_ε, X_1)/Var(X_ε) of the flow process with σ² = ρ · 2η."""
    share = variance / (start**2 * variance + (1 - start) ** 2)
    return math.sqrt(share) * (start * math.sqrt(share)) ** rho


def velocity_slope(t: Tensor, variance: float) -> Tensor:
    """∂v/∂x of a scalar normal law on the flow path."""
    return (t * variance - (1 - t)) / (t**2 * variance + (1 - t) ** 2)


@pytest.mark.parametrize("integrator", INTEGRATORS)
@pytest.mark.parametrize("start", [0.05, 0.3])
def test_the_noise_is_the_memoryless_one(integrator, start):
    grid = torch.linspace(start, 1, 4001, dtype=torch.float64)
    t, h = grid[:-1], grid.diff()
    step = INTEGRATORS[integrator](t, h)
    product = float((step.state + step.velocity * velocity_slope(t, 0.36)).prod())
    # O(h), h = 1/4000, times the steep start 1/ε = 20.
    assert product == pytest.approx(memory(1, start, 0.36), rel=1e-2)
    for rho in (0.5, 2):  # so this test tells half and double the noise apart
        assert abs(product / memory(rho, start, 0.36) - 1) > 0.2


@pytest.mark.parametrize("rho", [0.5, 1, 2])
def test_the_memory_formula_holds_for_other_noise_levels(rho):
    """The reference itself: Euler for b = κx + (1 + ρ) η s, written here."""
    grid = torch.linspace(0.05, 1, 40_001, dtype=torch.float64)
    t, h = grid[:-1], grid.diff()
    slope = 1 / t - (1 + rho) * (1 - t) / t / (t**2 * 0.36 + (1 - t) ** 2)
    assert float((1 + h * slope).prod()) == pytest.approx(memory(rho, 0.05, 0.36), rel=5e-3)


def test_stable_diffusion_s_schedule_keeps_the_memory_of_its_first_level():
    """A β-schedule starts at √ᾱ = .068, not at 0: x_0 still shows in x_K by α C S⁻¹, and by no more."""
    sampler = Sampler.over(ddim(500, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"))
    carry, exact = sampler.chain(NORMAL).carry()[0], carried_slope(NORMAL, sampler)[0]
    assert float(sampler.alphas[0]) == pytest.approx(0.068, abs=1e-3)
    # 500 first-order steps: 3 % were measured, 7 % with 200.
    torch.testing.assert_close(carry, exact, atol=0, rtol=0.05)


@pytest.mark.parametrize("sigma", [0.2, 1.0])
def test_constant_noise_falls_short_of_the_tilt_by_its_memory(sigma):
    """T5, negative control: the same steering on a sampler that is not memoryless; 6 % and 79 % of the tilt."""
    steps, spread = 400, 0.8
    sampler, law = constant_noise(sigma, steps), mixture_1d([1.0], [0.7], [spread**2])
    mean, slope = sampler.mean(law), QuadraticReward.linear(tensor([1.3]))
    plain = sampler.path(mean, torch.zeros(1, 1, dtype=torch.float64), seed=None)
    lean = lean_from_end(mean, plain, lambda end: -slope.grad(end))

    def push(k: int, x: Tensor) -> Tensor:
        return mean(k, x) - sampler.stds[k] ** 2 * lean.adjoints[k + 1]

    shift = float(sampler.path(push, plain.states[0], seed=None).states[-1] - plain.states[-1])
    predicted = 1.3 * spread**2 * (1 - math.exp(-math.pi * sigma**2 / (2 * spread)))
    # First order in h = 1/400; the formula is continuous time's.
    assert shift == pytest.approx(predicted, rel=2e-2)
    assert shift < 0.9 * 1.3 * spread**2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prediction", "integrator", "reward"),
    [
        ("flow_prediction", "euler", "quadratic"),
        ("flow_prediction", "compensated", "linear"),
        ("flow_prediction", "local_linear", "quadratic"),
        ("flow_prediction", "ancestral", "linear"),
        ("flow_prediction", "posterior", "quadratic"),
        ("epsilon", "posterior", "linear"),
        ("v_prediction", "compensated", "quadratic"),
    ],
)
def test_the_tilted_expectation_of_the_adjoint_is_the_difference_of_scores(prediction, integrator, reward):
    """E*[ã | X_t = x] = s − s*, by base paths weighted with e^r (self-normalised importance sampling)."""
    bent = QuadraticReward(tensor([0.3]), tensor([[0.8]]), tensor([0.5]))
    goal = QuadraticReward.linear(tensor([0.9])) if reward == "linear" else bent
    sampler, steps, paths, points = Sampler.of(prediction, integrator, 300), 300, 30_000, tensor([[0.1], [0.8]])
    first = int((sampler.alphas / (sampler.alphas + sampler.betas) < 0.4).sum())  # flow time .4
    noise = draw(steps - first, paths, 1, seed=5)
    noise = torch.cat([noise, -noise], 1)  # antithetic: less variance for nothing

    def mean(k: int, x: Tensor) -> Tensor:
        return sampler.mean(BIMODAL)(first + k, x)

    grid = sampler.timesteps[first:], sampler.stds[first:]
    tail = rollout(mean, points.repeat(paths, 1), *grid, lambda k: noise[k], keep_last=True)
    lean = lean_adjoint(mean, tail, -goal.grad(tail.states[-1]))
    weight = goal(tail.states[-1]).view(paths, len(points)).softmax(0)
    expected = (weight * lean.adjoints[0].view(paths, len(points))).sum(0)
    levels = float(sampler.alphas[first]), float(sampler.betas[first])
    difference = (BIMODAL.noised(*levels).score(points) - BIMODAL.tilt(goal)[0].noised(*levels).score(points))[:, 0]
    # Three Monte-Carlo standard errors of 4e-3, and O(1/K) of some 7e-3.
    torch.testing.assert_close(expected, difference, atol=2e-2, rtol=0)
    assert difference.abs().min() > 0.08
