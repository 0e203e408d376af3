"""The method against closed forms, in float64, through the real schedulers: every family, prediction type and integrator.

The network is replaced by the exact one (`problems.model_output`), so whatever is left is the method's own error. On a
Gaussian law every sampler is an affine chain with an exact discrete optimum: those tests know no step-size error and hold
to rounding. Tests against continuous time hold to O(1/K) and check that order.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from diffusers import DDIMScheduler
from problems import AffineChain, GaussianMixture, QuadraticReward, gaussian, mixture_1d, model_output, sliced_w2
from torch import Tensor

from diffusers_adjoint.adjoint import lean_adjoint
from diffusers_adjoint.matching import control, matching_loss, step_kl
from diffusers_adjoint.schedulers import MemorylessDDIMScheduler, MemorylessFlowMatchEulerDiscreteScheduler
from diffusers_adjoint.schedulers.integrators import INTEGRATORS
from diffusers_adjoint.trajectory import Trajectory, rollout

FAMILIES = ["flow_prediction", "epsilon", "v_prediction", "sample"]
CASES = [(prediction, integrator) for prediction in FAMILIES for integrator in INTEGRATORS]
# Tens of float64 matrix products in another order, on numbers of order one.
EXACT = {"atol": 1e-11, "rtol": 1e-11}


def tensor(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# A matrix case: correlated, off centre, not unit size; and a bimodal law whose adjoints depend on the path.
NORMAL = gaussian(tensor([0.7, -0.4]), tensor([[0.36, 0.15], [0.15, 0.5]]))
BIMODAL = mixture_1d([0.35, 0.65], [-1.0, 0.9], [0.16, 0.3])
LINEAR = QuadraticReward.linear(tensor([1.3, -0.8]))
QUADRATIC = QuadraticReward(tensor([0.4, 0.2]), tensor([[1.2, -0.3], [-0.3, 0.8]]), tensor([-0.5, 1.0]))


@dataclass(frozen=True)
class Sampler:
    """A memoryless scheduler on its grid, with the noise levels x_k = α_k X_1 + β_k X_0 of the states."""

    scheduler: MemorylessFlowMatchEulerDiscreteScheduler | MemorylessDDIMScheduler
    prediction_type: str
    alphas: Tensor
    betas: Tensor

    @classmethod
    def of(cls, prediction_type: str, integrator: str, steps: int) -> Sampler:
        if prediction_type == "flow_prediction":
            flow = MemorylessFlowMatchEulerDiscreteScheduler(integrator=integrator)
            flow.set_timesteps(steps)
            sigmas = flow.sigmas.double()
            return cls(flow, prediction_type, 1 - sigmas, sigmas)
        ddim = MemorylessDDIMScheduler(
            integrator=integrator, prediction_type=prediction_type, timestep_spacing="trailing", clip_sample=False
        )
        ddim.set_timesteps(steps)
        kept = torch.cat([ddim.alphas_cumprod[ddim.timesteps], ddim.final_alpha_cumprod.view(1)]).double()
        return cls(ddim, prediction_type, kept.sqrt(), (1 - kept).sqrt())

    @property
    def stds(self) -> Tensor:
        return self.scheduler.stds.double()

    def output(self, law: GaussianMixture, k: int, x: Tensor) -> Tensor:
        return model_output(law, x, float(self.alphas[k]), float(self.betas[k]), self.prediction_type)

    def mean(self, law: GaussianMixture) -> Callable[[int, Tensor], Tensor]:
        """Step mean with the network that is exact for `law`."""
        return lambda k, x: self.scheduler.transition(self.output(law, k, x), x, k).mean

    def chain(self, law: GaussianMixture) -> AffineChain:
        return AffineChain.of(self.mean(law), self.stds, law.means.shape[1])

    def path(self, mean: Callable[[int, Tensor], Tensor], start: Tensor, seed: int | None) -> Trajectory:
        """Rollout of all K steps; `None` switches the noise off."""
        shape = (len(self.stds), *start.shape)
        noise = torch.zeros(shape, dtype=torch.float64) if seed is None else draw(*shape, seed=seed)
        return rollout(mean, start, self.scheduler.timesteps, self.stds, lambda k: noise[k], keep_last=True)


def noisy_steps(sampler: Sampler) -> list[int]:
    return [k for k, std in enumerate(sampler.stds) if std > 0]


# --- The instruments: problems.py against quadrature, autograd and brute force --------------------------------------------


def grid_1d(low: float = -9.0, high: float = 9.0, count: int = 4001) -> Tensor:
    return torch.linspace(low, high, count, dtype=torch.float64)


@pytest.mark.parametrize("reward", [LINEAR, QUADRATIC])
def test_tilted_mixture_is_the_normalised_product(reward):
    law = GaussianMixture(
        tensor([0.3, 0.7]), tensor([[-1.0, 0.5], [1.0, 0.0]]), torch.stack([NORMAL.covariances[0], torch.eye(2) * 0.4])
    )
    axis = grid_1d(count=451)
    points = torch.cartesian_prod(axis, axis)
    area = float(axis[1] - axis[0]) ** 2
    weight = law.log_prob(points).exp() * reward(points).exp() * area
    tilted, log_z = law.tilt(reward)
    # The trapezoidal rule converges exponentially for a smooth density that vanishes at the border.
    torch.testing.assert_close(log_z, weight.sum().log(), **EXACT)
    torch.testing.assert_close(tilted.log_prob(points).exp() * area, weight / weight.sum(), **EXACT)
    torch.testing.assert_close(tilted.mean(), weight @ points / weight.sum(), **EXACT)


def test_scalar_tilts_are_the_textbook_ones():
    law, slope, curvature, centre = mixture_1d([1.0], [0.7], [0.36]), 1.3, 2.0, -0.5
    linear, log_z = law.tilt(QuadraticReward.linear(tensor([slope])))
    assert float(linear.mean()) == pytest.approx(0.7 + 1.3 * 0.36) and float(linear.covariance()) == pytest.approx(0.36)
    assert float(log_z) == pytest.approx(slope * 0.7 + 0.5 * slope**2 * 0.36)
    quadratic, log_z = law.tilt(QuadraticReward(tensor([0.0]), tensor([[curvature]]), tensor([centre])))
    variance = 1 / (1 / 0.36 + curvature)
    assert float(quadratic.covariance()) == pytest.approx(variance)
    assert float(quadratic.mean()) == pytest.approx(variance * (0.7 / 0.36 + curvature * centre))
    assert float(log_z) == pytest.approx(0.5 * math.log(variance / 0.36) - 0.5 * curvature * 1.2**2 / (1 + curvature * 0.36))


@pytest.mark.parametrize("path", ["flow", "vp"])
def test_predictions_are_those_of_the_score(path):
    """The conversion table (T9), against autograd of the noised density."""
    alpha, beta = (0.3, 0.7) if path == "flow" else (0.6, 0.8)
    x = draw(50, 1, seed=0).requires_grad_()
    noised = BIMODAL.noised(alpha, beta)
    score = torch.autograd.grad(noised.log_prob(x).sum(), x)[0]
    x = x.detach()
    torch.testing.assert_close(noised.score(x), score, **EXACT)
    noise, data = -beta * score, (x + beta**2 * score) / alpha
    torch.testing.assert_close(model_output(BIMODAL, x, alpha, beta, "epsilon"), noise, **EXACT)
    torch.testing.assert_close(model_output(BIMODAL, x, alpha, beta, "sample"), data, **EXACT)
    if path == "flow":  # velocity κx + ηs, κ = 1/t, η = (1 − t)/t; diffusers predicts its negative
        velocity = x / alpha + beta / alpha * score
        torch.testing.assert_close(model_output(BIMODAL, x, alpha, beta, "flow_prediction"), -velocity, **EXACT)
    else:
        v = model_output(BIMODAL, x, alpha, beta, "v_prediction")
        torch.testing.assert_close(alpha * x - beta * v, data, **EXACT)
        torch.testing.assert_close(alpha * v + beta * x, noise, **EXACT)


def test_sliced_w2_measures_a_known_distance():
    levels = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    exact = 0.7 + 0.6 * torch.special.ndtri(levels)[:, None]
    law = mixture_1d([1.0], [0.7], [0.36])
    assert sliced_w2(exact, law) < 1e-6  # interpolation on a grid of 5e-4 standard deviations, squared
    # W2 between normals: √(difference of means² + difference of deviations²); 20 000 quantiles cut the tails: 1e-3.
    assert sliced_w2(exact, mixture_1d([1.0], [0.3], [0.09])) == pytest.approx(math.hypot(0.4, 0.3), abs=1e-3)
    samples = NORMAL.sample(20_000, torch.Generator().manual_seed(0))
    # In 2-D a shift d counts d²/2 on the average over directions; sampling noise is some 1/√20 000 = 7e-3.
    assert sliced_w2(samples, NORMAL) < 0.02
    assert sliced_w2(samples + tensor([3.0, 4.0]), NORMAL) == pytest.approx(5 / math.sqrt(2), abs=0.02)


@pytest.mark.parametrize("reward", [LINEAR, QUADRATIC])
def test_no_affine_control_costs_less_than_the_riccati_control(reward):
    chain = Sampler.of("epsilon", "compensated", 6).chain(NORMAL)
    start = tensor([0.4, -1.1])
    gains, offsets = (x.requires_grad_() for x in chain.optimal_control(reward))
    cost = expected_cost(chain, gains, offsets, reward, start)
    for slope in torch.autograd.grad(cost, (gains, offsets)):  # the cost is convex: stationary is optimal
        torch.testing.assert_close(slope, torch.zeros_like(slope), **EXACT)

    tilted, log_z = chain.terminal_law(start).tilt(reward)
    # Gibbs: no law has a lower cost than the tilted one, −log E[e^r]. A control moves means only, so with steps of finite
    # length it attains the bound for a linear reward, whose tilt moves means only, and stays above it for a quadratic one.
    gap = float(cost.detach() + log_z)
    assert gap == pytest.approx(0, abs=1e-11) if reward is LINEAR else 1e-3 < gap < 0.5
    if reward is LINEAR:
        steered = chain.controlled(gains.detach(), offsets.detach()).terminal_law(start)
        torch.testing.assert_close(steered.mean(), tilted.mean(), **EXACT)
        torch.testing.assert_close(steered.covariance(), tilted.covariance(), **EXACT)


def expected_cost(chain: AffineChain, gains: Tensor, offsets: Tensor, reward: QuadraticReward, start: Tensor) -> Tensor:
    """E[½ Σ‖w_k‖² − r(x_K)] of an affine policy from a point, by propagating mean and covariance."""
    mean, covariance, cost = start, torch.zeros(len(start), len(start), dtype=torch.float64), tensor(0.0)
    steered = chain.controlled(gains, offsets)
    for k, std in enumerate(chain.stds):
        push = gains[k] @ mean + offsets[k]
        cost = cost + 0.5 * (push @ push + (gains[k] @ covariance @ gains[k].T).trace())
        mean = steered.jacobians[k] @ mean + steered.offsets[k]
        covariance = steered.jacobians[k] @ covariance @ steered.jacobians[k].T + std**2 * torch.eye(len(start))
    return cost - reward(mean[None])[0] + 0.5 * (reward.curvature @ covariance).trace()


# --- Exact on the grid: T4, T1 and T2 without a step-size error -----------------------------------------------------------


@pytest.mark.parametrize(("prediction", "integrator"), CASES)
def test_linear_reward_adjoint_is_minus_the_carried_slope(prediction, integrator):
    sampler = Sampler.of(prediction, integrator, 12)
    mean = sampler.mean(NORMAL)
    path = sampler.path(mean, draw(4, 2, seed=1), seed=2)
    lean = lean_adjoint(mean, path, lambda end: -LINEAR.grad(end))
    expected = -torch.einsum("kij,i->kj", sampler.chain(NORMAL).carry(), LINEAR.slope)
    torch.testing.assert_close(lean.adjoints, expected[:, None].expand_as(lean.adjoints), **EXACT)


@pytest.mark.parametrize(("prediction", "integrator"), CASES)
def test_quadratic_reward_adjoint_carries_the_end_point_s_slope(prediction, integrator):
    sampler = Sampler.of(prediction, integrator, 12)
    mean = sampler.mean(NORMAL)
    path = sampler.path(mean, draw(4, 2, seed=1), seed=2)
    carry = sampler.chain(NORMAL).carry()
    for terminal, end in [
        (-QUADRATIC.grad(path.states[-1]), path.states[-1]),
        (lambda x: -QUADRATIC.grad(x), mean(11, path.states[-2])),
    ]:
        expected = torch.einsum("kij,bi->kbj", carry, -QUADRATIC.grad(end))
        torch.testing.assert_close(lean_adjoint(mean, path, terminal).adjoints, expected, **EXACT)


@pytest.mark.parametrize(("prediction", "integrator"), CASES)
def test_steering_by_the_adjoint_shifts_the_mean_by_slope_times_variance(prediction, integrator):
    """T4: exact for ã_{k+1}; the paper's ã_k gives Σ s² P_{k+1} P_kᵀ c instead."""
    sampler = Sampler.of(prediction, integrator, 12)
    mean, chain, start = sampler.mean(NORMAL), sampler.chain(NORMAL), draw(3, 2, seed=1)
    plain = sampler.path(mean, start, seed=None)
    lean = lean_adjoint(mean, plain, lambda end: -LINEAR.grad(end))

    def steered(pairing: int) -> Tensor:  # a linear reward's adjoint is the same on every path
        push = lambda k, x: mean(k, x) - sampler.stds[k] ** 2 * lean.adjoints[k + pairing]  # noqa: E731
        return sampler.path(push, start, seed=None).states[-1] - plain.states[-1]

    variance = chain.terminal_law(start[0]).covariance()
    # The requirement is 1e-4; the chain is exact, so rounding is all there is.
    torch.testing.assert_close(steered(pairing=1), (variance @ LINEAR.slope).expand(3, 2), **EXACT)
    carry = chain.carry()
    paper = sum(s**2 * p_next @ p.T for s, p_next, p in zip(chain.stds, carry[1:], carry[:-1], strict=True))
    torch.testing.assert_close(steered(pairing=0), (paper @ LINEAR.slope).expand(3, 2), **EXACT)
    assert (LINEAR.slope @ paper @ LINEAR.slope) < 0.9 * (LINEAR.slope @ variance @ LINEAR.slope)


@pytest.mark.parametrize(("prediction", "integrator"), CASES)
def test_the_loss_is_zero_at_the_optimum_of_a_linear_reward(prediction, integrator):
    """T1 on the grid: the optimal network's loss has no variance, and its path KL is ½ cᵀ Var(x_K | x_0) c."""
    sampler = Sampler.of(prediction, integrator, 12)
    base, chain = sampler.mean(NORMAL), sampler.chain(NORMAL)
    carried = torch.einsum("kij,i->kj", chain.carry(), LINEAR.slope)

    def optimal(k: int, x: Tensor) -> Tensor:
        output, probe = sampler.output(NORMAL, k, x), torch.ones_like(x)
        one_more = sampler.scheduler.transition(output + probe, x, k).mean - base(k, x)  # ∂μ/∂m, a number
        change = sampler.stds[k] ** 2 * carried[k + 1] / one_more
        return sampler.scheduler.transition(output + change, x, k).mean

    path = sampler.path(optimal, draw(5, 2, seed=1), seed=2)
    lean = lean_adjoint(base, path, lambda end: -LINEAR.grad(end))
    spent = torch.zeros(5, dtype=torch.float64)
    for k in noisy_steps(sampler):
        mean, std = optimal(k, path.states[k]), sampler.stds[k]
        # Rounding of the means, some 1e-15, over the smallest std of these grids, some 1e-3, squared: 1e-24.
        assert matching_loss(mean, lean.base_means[k], std, lean.adjoints[k + 1]).max() < 1e-20
        assert matching_loss(lean.base_means[k], lean.base_means[k], std, lean.adjoints[k + 1]).min() > 1e-8
        spent += step_kl(mean, lean.base_means[k], std)
    variance = chain.terminal_law(path.states[0, 0]).covariance()
    torch.testing.assert_close(spent, (0.5 * LINEAR.slope @ variance @ LINEAR.slope).expand(5), **EXACT)


@pytest.mark.parametrize(("prediction", "integrator"), CASES)
def test_the_expected_adjoint_at_the_riccati_optimum_is_its_control(prediction, integrator):
    """T2 on the grid. Everything is affine, so the expectation over the noise is the value on the noiseless path."""
    sampler = Sampler.of(prediction, integrator, 12)
    base, chain = sampler.mean(NORMAL), sampler.chain(NORMAL)
    optimal = chain.controlled(*chain.optimal_control(QUADRATIC)).mean
    path = sampler.path(optimal, 2 * draw(5, 2, seed=1), seed=None)
    lean = lean_adjoint(base, path, -QUADRATIC.grad(path.states[-1]))  # the noisy x_K: the chain's own end
    for k in noisy_steps(sampler):
        mean, std = optimal(k, path.states[k]), sampler.stds[k]
        # As for the linear reward.
        assert matching_loss(mean, lean.base_means[k], std, lean.adjoints[k + 1]).max() < 1e-20


@pytest.mark.parametrize(("prediction", "integrator"), CASES)
def test_the_first_regression_target_is_the_base_s_expected_end_slope(prediction, integrator):
    """T2, first iteration: from u = 0, E[ã_{k+1} | x_k] = P_{k+1}ᵀ (Q (E[x_K | x_k] − μ) − c)."""
    sampler = Sampler.of(prediction, integrator, 12)
    mean, chain = sampler.mean(NORMAL), sampler.chain(NORMAL)
    path = sampler.path(mean, draw(1, 2, seed=1), seed=None)
    lean = lean_adjoint(mean, path, -QUADRATIC.grad(path.states[-1]))
    law = chain.terminal_law(path.states[0, 0])
    for k in range(12):
        torch.testing.assert_close(lean.adjoints[k + 1, 0], -QUADRATIC.grad(law.mean()) @ chain.carry()[k + 1], **EXACT)


def test_repeated_regression_on_the_adjoint_converges_to_the_riccati_optimum():
    """Tabular Adjoint Matching: controls affine in x, refitted exactly, half a step at a time, from u = 0."""
    steps, dim = 6, 2
    sampler = Sampler.of("epsilon", "compensated", steps)
    chain = sampler.chain(NORMAL)
    probes = torch.cat([torch.zeros(1, dim, dtype=torch.float64), torch.eye(dim, dtype=torch.float64)])
    gains, offsets = torch.zeros(steps, dim, dim, dtype=torch.float64), torch.zeros(steps, dim, dtype=torch.float64)
    for _ in range(50):
        policy = chain.controlled(gains, offsets).mean
        new_gains, new_offsets = gains.clone(), offsets.clone()
        for first in noisy_steps(sampler):
            states = [probes] * (first + 1)  # conditional paths: from the probes at `first`, without noise
            for k in range(first, steps):
                states.append(policy(k, states[-1]))
            path = Trajectory(torch.stack(states), sampler.scheduler.timesteps, sampler.stds)
            lean = lean_adjoint(chain.mean, path, -QUADRATIC.grad(path.states[-1]), lowest=first + 1)
            target = -sampler.stds[first] * lean.adjoints[first + 1]
            new_offsets[first], new_gains[first] = target[0], (target[1:] - target[:1]).T
        gains, offsets = (gains + new_gains) / 2, (offsets + new_offsets) / 2
    best_gains, best_offsets = chain.optimal_control(QUADRATIC)
    assert best_gains.abs().max() > 0.1 and best_offsets.abs().max() > 0.1
    # A sweep halves the error (where the control is weak) or better; 50 sweeps leave far less than 1e-8.
    torch.testing.assert_close(gains, best_gains, atol=1e-8, rtol=0)
    torch.testing.assert_close(offsets, best_offsets, atol=1e-8, rtol=0)


def test_standard_normal_base_on_the_vp_path_only_rescales():
    """T3: with ε = √(1 − ᾱ) x the ancestral step multiplies by √(ᾱ_k/ᾱ_{k+1}), so ã_k = √(ᾱ_k/ᾱ_K) ã_K."""
    for prediction in ("epsilon", "v_prediction", "sample"):
        sampler = Sampler.of(prediction, "ancestral", 12)
        mean = sampler.mean(gaussian(torch.zeros(2, dtype=torch.float64), torch.eye(2, dtype=torch.float64)))
        path, end = sampler.path(mean, draw(4, 2, seed=1), seed=2), draw(4, 2, seed=3)
        ratio = (sampler.alphas / sampler.alphas[-1])[:, None, None]
        torch.testing.assert_close(lean_adjoint(mean, path, end).adjoints, ratio * end, **EXACT)


# --- Against continuous time: T1, T2, T6 and Theorem 1 to O(1/K) ----------------------------------------------------------


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
    lean = lean_adjoint(base, path, lambda end: -LINEAR.grad(end))
    linear, quadratic = NORMAL.tilt(LINEAR)[0], NORMAL.tilt(QUADRATIC)[0]
    riccati, tilted = chain.controlled(*chain.optimal_control(QUADRATIC)).mean, sampler.mean(quadratic)
    loss = gap = tensor(0.0)
    for k in noisy_steps(sampler):
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
    lean = lean_adjoint(mean, sampler.path(mean, draw(1, 2, seed=1), seed=2), lambda end: -LINEAR.grad(end))
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
    sampler = Sampler.of(prediction, "compensated", steps)
    target = NORMAL.tilt(reward)[0]
    parent = type(sampler.scheduler).__mro__[1].from_config(sampler.scheduler.config)
    parent.set_timesteps(steps)
    assert torch.equal(parent.timesteps, sampler.scheduler.timesteps)

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
    scheduler = MemorylessDDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="trailing", clip_sample=False
    )
    scheduler.set_timesteps(500)
    kept = torch.cat([scheduler.alphas_cumprod[scheduler.timesteps], scheduler.final_alpha_cumprod.view(1)]).double()
    sampler = Sampler(scheduler, "epsilon", kept.sqrt(), (1 - kept).sqrt())
    carry, exact = sampler.chain(NORMAL).carry()[0], carried_slope(NORMAL, sampler)[0]
    assert float(sampler.alphas[0]) == pytest.approx(0.068, abs=1e-3)
    # 500 first-order steps: 3 % were measured, 7 % with 200.
    torch.testing.assert_close(carry, exact, atol=0, rtol=0.05)


# --- T7: mixtures, where the adjoint depends on the path ------------------------------------------------------------------


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

    grid = sampler.scheduler.timesteps[first:], sampler.stds[first:]
    tail = rollout(mean, points.repeat(paths, 1), *grid, lambda k: noise[k], keep_last=True)
    lean = lean_adjoint(mean, tail, -goal.grad(tail.states[-1]))
    weight = goal(tail.states[-1]).view(paths, len(points)).softmax(0)
    expected = (weight * lean.adjoints[0].view(paths, len(points))).sum(0)
    levels = float(sampler.alphas[first]), float(sampler.betas[first])
    difference = (BIMODAL.noised(*levels).score(points) - BIMODAL.tilt(goal)[0].noised(*levels).score(points))[:, 0]
    # Three Monte-Carlo standard errors of 4e-3, and O(1/K) of some 7e-3.
    torch.testing.assert_close(expected, difference, atol=2e-2, rtol=0)
    assert difference.abs().min() > 0.08


# --- T9: the schedulers' steps are those of the papers --------------------------------------------------------------------


@pytest.mark.parametrize("integrator", INTEGRATORS)
def test_the_prediction_type_does_not_change_the_step(integrator):
    x = draw(5, 1, seed=6)
    samplers = [Sampler.of(prediction, integrator, 9) for prediction in ("epsilon", "v_prediction", "sample")]
    for k in range(9):
        reference, *others = (sampler.mean(BIMODAL)(k, x) for sampler in samplers)
        for other in others:
            # ε → x̂_1 divides by α_0 = .0064 at the first step: two digits lost on rounding.
            torch.testing.assert_close(other, reference, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_the_ancestral_step_is_ddim_with_eta_one_and_ddpm(prediction):
    sampler, x = Sampler.of(prediction, "ancestral", 10), draw(5, 1, seed=6)
    ddim = DDIMScheduler.from_config(sampler.scheduler.config)
    ddim.set_timesteps(10)
    for k, t in enumerate(ddim.timesteps):
        output = sampler.output(BIMODAL, k, x)
        ours = sampler.scheduler.transition(output, x, k)
        moved, still = (ddim.step(output, t, x, eta=1.0, variance_noise=n).prev_sample for n in (torch.ones_like(x), 0 * x))
        # diffusers' tables are float32.
        torch.testing.assert_close(ours.mean, still.double(), atol=2e-5, rtol=0)
        torch.testing.assert_close(ours.sample(torch.ones_like(x)), moved.double(), atol=2e-5, rtol=0)

        data, _ = BIMODAL.denoise(x, float(sampler.alphas[k]), float(sampler.betas[k]))
        kept, kept_next = sampler.alphas[k] ** 2, sampler.alphas[k + 1] ** 2
        ratio = kept / kept_next  # DDPM's α_t; its posterior mean is eq. 7 of 2006.11239
        posterior = (kept_next.sqrt() * (1 - ratio) * data + ratio.sqrt() * (1 - kept_next) * x) / (1 - kept)
        torch.testing.assert_close(ours.mean, posterior, **EXACT)


def test_the_control_in_units_of_the_network_is_the_paper_s():
    """DDIM: c_k = √(ᾱ'/(ᾱ(1−ᾱ')) (1−ᾱ/ᾱ')) per unit of ε (2409.08861, eq. 223); flow: √h · 2/σ per unit of v (eqs. 27, 236)."""
    x, change = draw(5, 1, seed=6), draw(5, 1, seed=7)
    vp = Sampler.of("epsilon", "ancestral", 10)
    flow = Sampler.of("flow_prediction", "euler", 10)
    kept = vp.alphas**2
    c = (kept[1:] / (kept[:-1] * (1 - kept[1:])) * (1 - kept[:-1] / kept[1:])).sqrt()
    t, h = flow.alphas[:-1], flow.alphas.diff()
    sigma = (2 * (1 - t + h) / (t + h)).sqrt()
    for sampler, factor in ((vp, -c), (flow, -h.sqrt() * 2 / sigma)):
        for k in noisy_steps(sampler):
            means = [sampler.scheduler.transition(output, x, k).mean for output in (change, 0 * change)]
            torch.testing.assert_close(control(*means, sampler.stds[k]), factor[k] * change, atol=1e-9, rtol=1e-9)


# --- T10: structure, on a network with parameters and a law that is not normal --------------------------------------------


class Corrected(torch.nn.Module):
    """The exact network plus a small trained one: what fine-tuning starts from, with known base."""

    def __init__(self, sampler: Sampler, law: GaussianMixture, *, zero: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.sampler, self.law = sampler, law
        self.net = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)).double()
        if zero:
            torch.nn.init.zeros_(self.net[2].weight)
            torch.nn.init.zeros_(self.net[2].bias)

    def forward(self, k: int, x: Tensor) -> Tensor:
        time = torch.full_like(x, k / 10)
        output = self.sampler.output(self.law, k, x) + 0.3 * self.net(torch.cat([x, time], 1))
        return self.sampler.scheduler.transition(output, x, k).mean


BENT = QuadraticReward(tensor([0.5]), tensor([[0.7]]), tensor([0.2]))
STEPS = 8


def setting(prediction: str, integrator: str, *, zero: bool = False) -> tuple[Sampler, Corrected, Corrected, Trajectory]:
    """Sampler, frozen base, trained model and a path of the trained one."""
    sampler = Sampler.of(prediction, integrator, STEPS)
    base, trained = Corrected(sampler, BIMODAL, zero=zero), Corrected(sampler, BIMODAL, zero=zero)
    if not zero:
        torch.nn.init.normal_(trained.net[2].weight)
    return sampler, base, trained, sampler.path(trained, draw(6, 1, seed=8), seed=9)


def total_loss(sampler: Sampler, base: Corrected, trained: Corrected, path: Trajectory, reward: QuadraticReward) -> Tensor:
    lean = lean_adjoint(base, path, lambda end: -reward.grad(end))
    terms = [
        matching_loss(trained(k, path.states[k]), lean.base_means[k], sampler.stds[k], lean.adjoints[k + 1])
        for k in noisy_steps(sampler)
    ]
    return torch.stack(terms).sum(0)


def gradients(model: Corrected) -> list[Tensor]:
    grads = [parameter.grad for parameter in model.net.parameters()]
    model.zero_grad()
    return grads


@pytest.mark.parametrize(("prediction", "integrator"), CASES)
def test_the_adjoint_is_the_gradient_through_the_sampler(prediction, integrator):
    """Along a base path, against autograd through all steps and against finite differences; the end is the noisy x_K."""
    sampler, base, _, _ = setting(prediction, integrator)
    noise, start = draw(STEPS, 6, 1, seed=9), draw(6, 1, seed=8)

    def end_from(x: Tensor, k: int) -> Tensor:
        for j in range(k, STEPS):
            x = base(j, x) + sampler.stds[j] * noise[j]
        return x

    path = sampler.path(base, start, seed=9)
    lean = lean_adjoint(base, path, -BENT.grad(path.states[-1]))
    for k in range(STEPS):
        x = path.states[k].clone().requires_grad_()
        through_all = torch.autograd.grad(-BENT(end_from(x, k)).sum(), x)[0]
        torch.testing.assert_close(lean.adjoints[k], through_all, **EXACT)
        width = 1e-5
        up, down = (BENT(end_from(path.states[k] + sign * width, k)) for sign in (1, -1))
        # Truncation ~ width² = 1e-10 times third derivatives (bimodal: up to 1e3), rounding 1e-11.
        torch.testing.assert_close(lean.adjoints[k, :, 0], -(up - down).detach() / (2 * width), atol=1e-6, rtol=0)


@pytest.mark.parametrize("prediction", FAMILIES)
def test_the_gradient_reaches_the_trained_network_and_nothing_else(prediction):
    sampler, base, trained, path = setting(prediction, "compensated")
    total_loss(sampler, base, trained, path, BENT).sum().backward()
    assert all(grad.abs().max() > 0 for grad in gradients(trained))
    assert gradients(base) == [None] * 4  # its parameters do require a gradient
    assert path.states.grad is None and not path.states.requires_grad


@pytest.mark.parametrize("prediction", FAMILIES)
def test_the_adjoint_does_not_know_the_trained_network(prediction):
    _, base, trained, path = setting(prediction, "compensated")
    before = lean_adjoint(base, path, lambda end: -BENT.grad(end)).adjoints
    torch.nn.init.normal_(trained.net[0].weight)
    assert torch.equal(lean_adjoint(base, path, lambda end: -BENT.grad(end)).adjoints, before)


@pytest.mark.parametrize("prediction", FAMILIES)
def test_scaling_the_reward_scales_adjoint_and_optimal_control(prediction):
    sampler, base, _, path = setting(prediction, "compensated")
    one, three = (lean_adjoint(base, path, lambda end, r=r: -r.grad(end)).adjoints for r in (BENT, BENT.scaled(3)))
    torch.testing.assert_close(three, 3 * one, **EXACT)
    chain = sampler.chain(NORMAL)
    one, three = (torch.cat([x.flatten() for x in chain.optimal_control(r)]) for r in (LINEAR, LINEAR.scaled(3)))
    torch.testing.assert_close(three, 3 * one, **EXACT)


@pytest.mark.parametrize("prediction", FAMILIES)
def test_at_the_base_the_loss_is_half_the_scaled_adjoint_squared(prediction):
    sampler, base, trained, path = setting(prediction, "compensated", zero=True)
    lean = lean_adjoint(base, path, lambda end: -BENT.grad(end))
    expected = 0.5 * (sampler.stds[:, None] * lean.adjoints[1:, :, 0]).square().sum(0)
    torch.testing.assert_close(total_loss(sampler, base, trained, path, BENT), expected, **EXACT)


@pytest.mark.parametrize("prediction", FAMILIES)
def test_without_reward_the_base_is_a_fixed_point_to_the_bit(prediction):
    sampler, base, trained, path = setting(prediction, "compensated", zero=True)
    total_loss(sampler, base, trained, path, BENT.scaled(0.0)).sum().backward()
    assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in gradients(trained))


@pytest.mark.parametrize("prediction", FAMILIES)
def test_the_gradient_does_not_depend_on_how_batch_and_steps_are_split(prediction):
    sampler, base, trained, path = setting(prediction, "compensated")
    total_loss(sampler, base, trained, path, BENT).sum().backward()
    whole = gradients(trained)
    for rows in (slice(0, 1), slice(1, 6)):
        part = Trajectory(path.states[:, rows], path.timesteps, path.stds)
        lean = lean_adjoint(base, part, lambda end: -BENT.grad(end))
        for k in noisy_steps(sampler):  # one backward a step and a part of the batch
            mean = trained(k, part.states[k])
            matching_loss(mean, lean.base_means[k], sampler.stds[k], lean.adjoints[k + 1]).sum().backward()
    for split, together in zip(gradients(trained), whole, strict=True):
        torch.testing.assert_close(split, together, atol=1e-10, rtol=1e-10)
