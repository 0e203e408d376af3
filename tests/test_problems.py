"""The instruments: problems with known answers, against quadrature, autograd and brute force."""

from __future__ import annotations

import math

import pytest
import torch
from problems import (
    AffineChain,
    DoubleWell,
    GaussianMixture,
    LinearQuadratic,
    QuadraticReward,
    gaussian,
    hopf_cole,
    mixture_1d,
    model_output,
    sliced_w2,
)
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


def expected_cost(
    chain: AffineChain, gains: Tensor, offsets: Tensor, reward: QuadraticReward, start: Tensor, running: Tensor | None = None
) -> Tensor:
    """E[Σ ½‖w_k‖² + ½ x_kᵀ P_k x_k − r(x_K)] of an affine policy from a point, by propagating mean and covariance."""
    mean, covariance, cost = start, torch.zeros(len(start), len(start), dtype=torch.float64), tensor(0.0)
    steered = chain.controlled(gains, offsets)
    for k, std in enumerate(chain.stds):
        push = gains[k] @ mean + offsets[k]
        cost = cost + 0.5 * (push @ push + (gains[k] @ covariance @ gains[k].T).trace())
        if running is not None:
            cost = cost + 0.5 * (mean @ running[k] @ mean + (running[k] @ covariance).trace())
        mean = steered.jacobians[k] @ mean + steered.offsets[k]
        covariance = steered.jacobians[k] @ covariance @ steered.jacobians[k].T + std**2 * torch.eye(len(start))
    return cost - reward(mean[None])[0] + 0.5 * (reward.curvature @ covariance).trace()


def test_no_affine_control_costs_less_under_diagonal_noise_and_a_running_cost():
    half = 0.4 * draw(5, 2, 2, seed=1)
    running = half @ half.transpose(1, 2)
    stds = draw(5, 2, seed=2).abs()
    stds[1, 0] = 0  # a coordinate without noise is one without control
    chain = AffineChain(torch.eye(2) + 0.3 * draw(5, 2, 2, seed=3), draw(5, 2, seed=4), stds)
    gains, offsets = (x.requires_grad_() for x in chain.optimal_control(QUADRATIC, running))
    cost = expected_cost(chain, gains, offsets, QUADRATIC, tensor([0.4, -1.1]), running)
    for slope in torch.autograd.grad(cost, (gains, offsets)):
        torch.testing.assert_close(slope, torch.zeros_like(slope), **EXACT)


def test_stretched_coordinates_make_the_noise_diagonal_and_leave_the_control_alone():
    """y = D x: the same chain, so the same w_k, with standard deviations s_k D."""
    chain, start = Sampler.of("epsilon", "compensated", 6).chain(NORMAL), tensor([0.4, -1.1])
    stretch, shrink = torch.diag(tensor([2.0, 0.3])), torch.diag(1 / tensor([2.0, 0.3]))
    other = AffineChain(stretch @ chain.jacobians @ shrink, chain.offsets @ stretch, chain.stds[:, None] * tensor([2.0, 0.3]))
    reward = QuadraticReward(shrink @ QUADRATIC.slope, shrink @ QUADRATIC.curvature @ shrink, stretch @ QUADRATIC.centre)
    control, same = chain.optimal_control(QUADRATIC), other.optimal_control(reward)
    torch.testing.assert_close(same[0] @ stretch, control[0], **EXACT)
    torch.testing.assert_close(same[1], control[1], **EXACT)
    law, seen = chain.controlled(*control).terminal_law(start), other.controlled(*same).terminal_law(stretch @ start)
    torch.testing.assert_close(seen.mean(), stretch @ law.mean(), **EXACT)
    torch.testing.assert_close(seen.covariance(), stretch @ law.covariance() @ stretch, **EXACT)


# No symmetry to hide a transpose, and noise of two sizes.
STEERED = LinearQuadratic(
    matrix=tensor([[-0.6, 1.1], [-0.4, 0.3]]),
    running=tensor([[1.5, 0.4], [0.4, 0.7]]),
    terminal=tensor([[0.9, -0.3], [-0.3, 1.6]]),
    slope=tensor([1.2, -0.7]),
    sigma=tensor([0.6, 1.3]),
)


def test_the_riccati_control_of_finer_grids_converges_to_that_of_continuous_time():
    x = draw(6, 2, seed=0)

    def error(steps: int) -> float:
        times = torch.linspace(0, 1, steps + 1, dtype=torch.float64) ** 1.5
        gains, offsets = STEERED.chain(times).optimal_control(*STEERED.chain_costs(times))
        pushes = zip(times, times.diff(), gains, offsets, strict=False)
        return max(float((STEERED.control(x, t) - (x @ g.T + o) / h.sqrt()).abs().max()) for t, h, g, o in pushes)

    coarse, fine = error(80), error(160)
    assert fine < 0.05  # measured .034, of controls up to 3.4
    assert 1.9 < coarse / fine < 2.1  # first order; measured 1.975, and 1.987 from 160 to 320


def test_the_costs_of_the_grid_are_those_of_continuous_time():
    x, times = draw(5, 2, seed=0), tensor([0.0, 0.2, 0.5, 1.0])
    reward, running = STEERED.chain_costs(times)
    torch.testing.assert_close(-reward(x), STEERED.terminal_cost(x), **EXACT)
    torch.testing.assert_close(0.5 * (x @ running[1] * x).sum(1), 0.3 * STEERED.running_cost(x, times[1]), **EXACT)
    torch.testing.assert_close(STEERED.chain(times).mean(1, x), x + 0.3 * STEERED.drift(x, times[1]), **EXACT)


def test_a_linear_terminal_cost_under_linear_drift_has_the_textbook_control():
    """u* = −σ ∘ exp(Aᵀ(1 − t)) q, the same everywhere; exp(Aᵀ(1 − t)) q is the lean adjoint, on the grid P_kᵀ q."""
    none = torch.zeros(2, 2, dtype=torch.float64)
    problem = LinearQuadratic(STEERED.matrix, none, none, STEERED.slope, STEERED.sigma)
    for t in (0.0, tensor(0.35), 1.0):
        adjoint = torch.linalg.matrix_exp(problem.matrix.T * (1 - t)) @ problem.slope
        torch.testing.assert_close(problem.control(draw(3, 2, seed=0), t), (-problem.sigma * adjoint).expand(3, 2), **EXACT)

    def error(steps: int) -> float:
        chain = problem.chain(torch.linspace(0, 1, steps + 1, dtype=torch.float64))
        exact = torch.linalg.matrix_exp(problem.matrix.T) @ problem.slope
        return float((problem.slope @ chain.carry()[0] - exact).abs().max())

    assert 1.9 < error(80) / error(160) < 2.1  # first order, as above


def test_hopf_cole_is_second_order_where_the_value_is_known():
    """Ornstein–Uhlenbeck: −log E[e^{−g}] is a Gaussian integral; the control is that of `LinearQuadratic`."""
    one = tensor([1.0])
    problem = LinearQuadratic(-1.2 * one[None], 0 * one[None], 1.5 * one[None], -0.8 * one, 0.9 * one)
    reward = problem.chain_costs(tensor([0.0, 1.0]))[0]

    def errors(points: int, steps: int) -> Tensor:
        grid, values = hopf_cole(problem.drift, problem.terminal_cost, 0.9, half_width=6.0, points=points, steps=steps)
        inside = grid.abs() <= 1.5
        found = []
        for k in (0, steps // 2, steps * 4 // 5):
            shrunk = math.exp(-1.2 * (1 - k / steps))
            covariance = 0.9**2 * (1 - shrunk**2) / 2.4 * one[None]
            exact = torch.stack([-gaussian(shrunk * x[None], covariance).tilt(reward)[1] for x in grid[inside]])
            slopes = torch.gradient(values[k], spacing=(grid,), edge_order=2)[0][inside]
            control = problem.control(grid[inside][:, None], k / steps)[:, 0]
            found += [(values[k][inside] - exact).abs().max(), (-0.9 * slopes - control).abs().max()]
        return torch.stack(found)

    coarse, fine = errors(121, 20), errors(241, 40)
    assert fine.max() < 1e-3  # measured 4.7e-4, at step lengths 1/20 and 1/40
    assert (coarse / fine > 3.8).all() and (coarse / fine < 4.2).all()  # half of both steps, a quarter of the error


WELL = DoubleWell()


def test_the_double_well_has_the_value_of_finer_and_finer_euler_chains():
    """Another route to ψ: the Euler chain's transition density as a matrix, exact up to O(h), which Richardson removes."""
    grid = torch.linspace(-3, 3, 601, dtype=torch.float64)  # .01 apart; the narrowest kernel has .06: quadrature is exact
    inside = grid.abs() <= 2

    def value(steps: int, t: float) -> Tensor:
        mean = grid + WELL.drift(grid[:, None], 0.0)[:, 0] / steps
        kernel = torch.exp(-0.5 * steps * (grid - mean[:, None]) ** 2) * 0.01 * math.sqrt(steps / (2 * math.pi))
        psi = torch.exp(-WELL.terminal_cost(grid[:, None]))
        for _ in range(round(steps * (1 - t))):
            psi = kernel @ psi
        return -psi.log()

    for t in (0.0, 0.5):
        extrapolated = 2 * value(256, t) - value(128, t)
        control = -torch.gradient(extrapolated, spacing=(grid,), edge_order=2)[0]
        # What is left is O(h²): measured 1.2e-3 and 1.3e-3 (5 times that at half the steps), of values and controls up to 3.
        assert (WELL.value(grid[:, None], t)[inside] - extrapolated[inside]).abs().max() < 2e-3
        assert (WELL.control(grid[:, None], tensor(t))[inside, 0] - control[inside]).abs().max() < 2e-3
    torch.testing.assert_close(WELL.control(tensor([[7.0]]), 0.5), WELL.control(tensor([[3.0]]), 0.5))


@pytest.mark.parametrize(("start", "before", "after"), [(0.0, 0.5, 0.976), (-1.0, 0.081, 0.81)])
def test_under_the_double_well_s_control_every_path_costs_the_value(start, before, after):
    """∫ ½u² dt + ∫ u dB + g(X_1) = V(x_0) on every path under u*, and under no other control. And u* takes the mass to +1."""
    steps, count = 400, 2000
    h, cost = 1 / steps, torch.zeros(count, 1, dtype=torch.float64)
    paths = free = torch.full((count, 1), start, dtype=torch.float64)
    for k, noise in enumerate(draw(steps, count, 1, seed=0)):
        u = WELL.control(paths, k * h)
        cost = cost + 0.5 * h * u**2 + h**0.5 * u * noise
        paths = paths + h * (WELL.drift(paths, k * h) + u) + h**0.5 * noise
        free = free + h * WELL.drift(free, k * h) + h**0.5 * noise
    cost = cost[:, 0] + WELL.terminal_cost(paths)
    # The spread is O(√h): measured .075 and .102. With nine tenths of the control it is .149 and .232, without 2.8 and 2.1.
    assert cost.std() < 0.12
    assert float(cost.mean()) == pytest.approx(float(WELL.value(tensor([[start]]))), abs=0.01)  # O(h): measured .006
    for ends, share in ((free, before), (paths, after)):
        # Three standard deviations of a share of 2000 paths, at most.
        assert float((ends > 0).double().mean()) == pytest.approx(share, abs=0.034)
