"""The method on affine chains, where the optimum on the grid is known exactly, through the real schedulers, in float64.

The network is replaced by the exact one of a normal law, so a sampler is an affine chain, and adjoint, control and loss have
closed forms without step-size error: these tests hold to rounding, for every family, prediction type and integrator.
"""

from __future__ import annotations

import pytest
import torch
from adjoints import lean_from_end
from problems import gaussian
from samplers import BIMODAL, CASES, EXACT, LINEAR, NORMAL, QUADRATIC, Sampler, draw
from torch import Tensor

from diffusers_adjoint.core.adjoint import lean_adjoint
from diffusers_adjoint.core.matching import control, matching_loss, step_kl
from diffusers_adjoint.core.trajectory import Trajectory


@pytest.mark.parametrize(("prediction", "integrator"), CASES)
def test_linear_reward_adjoint_is_minus_the_carried_slope(prediction, integrator):
    sampler = Sampler.of(prediction, integrator, 12)
    mean = sampler.mean(NORMAL)
    path = sampler.path(mean, draw(4, 2, seed=1), seed=2)
    lean = lean_from_end(mean, path, lambda end: -LINEAR.grad(end))
    expected = -torch.einsum("kij,i->kj", sampler.chain(NORMAL).carry(), LINEAR.slope)
    torch.testing.assert_close(lean.adjoints, expected[:, None].expand_as(lean.adjoints), **EXACT)


@pytest.mark.parametrize(("prediction", "integrator"), CASES)
def test_quadratic_reward_adjoint_carries_the_end_point_s_slope(prediction, integrator):
    sampler = Sampler.of(prediction, integrator, 12)
    mean = sampler.mean(NORMAL)
    path = sampler.path(mean, draw(4, 2, seed=1), seed=2)
    carry = sampler.chain(NORMAL).carry()
    noisy_end = lean_adjoint(mean, path, -QUADRATIC.grad(path.states[-1]))
    noiseless_end = lean_from_end(mean, path, lambda x: -QUADRATIC.grad(x))
    for lean, end in [(noisy_end, path.states[-1]), (noiseless_end, mean(11, path.states[-2]))]:
        expected = torch.einsum("kij,bi->kbj", carry, -QUADRATIC.grad(end))
        torch.testing.assert_close(lean.adjoints, expected, **EXACT)


@pytest.mark.parametrize(("prediction", "integrator"), CASES)
def test_steering_by_the_adjoint_shifts_the_mean_by_slope_times_variance(prediction, integrator):
    """T4: exact for ã_{k+1}; the paper's ã_k gives Σ s² P_{k+1} P_kᵀ c instead."""
    sampler = Sampler.of(prediction, integrator, 12)
    mean, chain, start = sampler.mean(NORMAL), sampler.chain(NORMAL), draw(3, 2, seed=1)
    plain = sampler.path(mean, start, seed=None)
    lean = lean_from_end(mean, plain, lambda end: -LINEAR.grad(end))

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
        one_more = sampler.transition(output + probe, x, k).mean - base(k, x)  # ∂μ/∂m, a number
        change = sampler.stds[k] ** 2 * carried[k + 1] / one_more
        return sampler.transition(output + change, x, k).mean

    path = sampler.path(optimal, draw(5, 2, seed=1), seed=2)
    lean = lean_from_end(base, path, lambda end: -LINEAR.grad(end))
    spent = torch.zeros(5, dtype=torch.float64)
    for k in sampler.noisy_steps():
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
    for k in sampler.noisy_steps():
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
        for first in sampler.noisy_steps():
            states = [probes] * (first + 1)  # conditional paths: from the probes at `first`, without noise
            for k in range(first, steps):
                states.append(policy(k, states[-1]))
            path = Trajectory(torch.stack(states), sampler.timesteps, sampler.stds)
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


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_the_ancestral_step_is_ddpm_s_posterior(prediction):
    """2006.11239, eqs. 6–7: mean and (small) variance of q(x_{t−1} | x_t, x̂_1)."""
    sampler, x = Sampler.of(prediction, "ancestral", 10), draw(5, 1, seed=6)
    for k in range(10):
        ours = sampler.transition(sampler.output(BIMODAL, k, x), x, k)
        data, _ = BIMODAL.denoise(x, float(sampler.alphas[k]), float(sampler.betas[k]))
        kept, kept_next = sampler.alphas[k] ** 2, sampler.alphas[k + 1] ** 2
        ratio = kept / kept_next  # DDPM's α_t
        mean = (kept_next.sqrt() * (1 - ratio) * data + ratio.sqrt() * (1 - kept_next) * x) / (1 - kept)
        torch.testing.assert_close(ours.mean, mean, **EXACT)
        assert ours.std**2 == pytest.approx(float((1 - kept_next) / (1 - kept) * (1 - ratio)), rel=1e-10)


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
        for k in sampler.noisy_steps():
            means = [sampler.transition(output, x, k).mean for output in (change, 0 * change)]
            torch.testing.assert_close(control(*means, sampler.stds[k]), factor[k] * change, atol=1e-9, rtol=1e-9)
