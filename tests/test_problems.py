"""The instruments: problems with known answers, against quadrature, autograd and brute force."""

from __future__ import annotations

import math

import pytest
import torch
from problems import AffineChain, GaussianMixture, QuadraticReward, mixture_1d, model_output, sliced_w2
from samplers import BIMODAL, EXACT, LINEAR, NORMAL, QUADRATIC, Sampler, draw, tensor
from torch import Tensor


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
