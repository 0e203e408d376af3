"""Noising, the mean toward given data, and the score: closed forms of Gaussians and mixtures, and autograd."""

import math

import pytest
import torch
from problems import GaussianMixture, mixture_1d, model_output
from scheduler_problems import batch, normal

from diffusers_adjoint.schedulers import (
    MemorylessDDIMScheduler,
    MemorylessEDMEulerScheduler,
    MemorylessFlowMatchEulerDiscreteScheduler,
)
from diffusers_adjoint.schedulers.integrators import INTEGRATORS

KINDS = {
    "flow": (MemorylessFlowMatchEulerDiscreteScheduler, {}, "flow_prediction"),
    "flow, shift 3": (MemorylessFlowMatchEulerDiscreteScheduler, {"shift": 3.0}, "flow_prediction"),
    "epsilon": (MemorylessDDIMScheduler, {"prediction_type": "epsilon"}, "epsilon"),
    "sample": (MemorylessDDIMScheduler, {"prediction_type": "sample"}, "sample"),
    "v": (MemorylessDDIMScheduler, {"prediction_type": "v_prediction"}, "v_prediction"),
    "v, zero SNR": (
        MemorylessDDIMScheduler,
        {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
        "v_prediction",
    ),
    "EDM": (MemorylessEDMEulerScheduler, {}, "v_prediction"),
}
LAWS = {"Gaussian": normal(), "mixture": mixture_1d([0.4, 0.6], [-1.0, 1.0], [0.16, 0.09])}
STEPS = 8
# float64 on numbers of order one; √ᾱ ≥ .006 and β ≥ .002 are divided by, twice for the score.
EXACT = {"atol": 1e-8, "rtol": 1e-8}


def levels(scheduler):
    """α_k and β_k of the steps, from the public tables of the parent classes."""
    if isinstance(scheduler, MemorylessFlowMatchEulerDiscreteScheduler):
        beta = scheduler.sigmas[:-1].double()
        return (1 - beta).tolist(), beta.tolist()
    if isinstance(scheduler, MemorylessEDMEulerScheduler):
        alpha = (1 + scheduler.sigmas[:-1].double() ** 2).rsqrt()
        return alpha.tolist(), (alpha * scheduler.sigmas[:-1].double()).tolist()
    kept = scheduler.alphas_cumprod[scheduler.timesteps].double()
    return kept.sqrt().tolist(), (1 - kept).sqrt().tolist()


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def kind(request):
    """(integrator) → scheduler; its prediction type."""
    cls, config, prediction_type = request.param

    def ready(integrator="posterior"):
        scheduler = cls(integrator=integrator, **config)
        scheduler.set_timesteps(STEPS)
        return scheduler

    return ready, prediction_type


def test_noised_data_have_the_path_s_moments(kind):
    scheduler = kind[0]()
    for k, (alpha, beta) in enumerate(zip(*levels(scheduler), strict=True)):
        clean, noise = batch(3, 2, dtype=torch.float64), batch(3, 2, dtype=torch.float64, seed=1)
        torch.testing.assert_close(scheduler.noised(clean, noise, k), alpha * clean + beta * noise, **EXACT)


@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
def test_the_score_is_the_slope_of_the_log_density(kind, law):
    ready, prediction_type = kind
    scheduler, x = ready(), batch(16, 1, dtype=torch.float64)
    for k, (alpha, beta) in enumerate(zip(*levels(scheduler), strict=True)):
        leaf = x.clone().requires_grad_()
        at_k = GaussianMixture(law.weights, alpha * law.means, alpha**2 * law.covariances + beta**2)  # of numbers, d = 1
        slope = torch.autograd.grad(at_k.log_prob(leaf).sum(), leaf)[0]
        output = model_output(law, x, alpha, beta, prediction_type)
        clean = scheduler.clean(scheduler.transition(output, x, k).mean, x, k)
        torch.testing.assert_close(scheduler.score(clean, x, k), slope, **EXACT)


@pytest.mark.parametrize("integrator", INTEGRATORS)
def test_toward_a_network_s_own_prediction_is_its_transition(kind, integrator):
    ready, prediction_type = kind
    scheduler, x = ready(integrator), batch(16, 1, dtype=torch.float64)
    for k, (alpha, beta) in enumerate(zip(*levels(scheduler), strict=True)):
        clean = LAWS["mixture"].denoise(x, alpha, beta)[0]
        output = model_output(LAWS["mixture"], x, alpha, beta, prediction_type)
        mean = scheduler.transition(output, x, k).mean
        torch.testing.assert_close(scheduler.toward(clean, x, k), mean, **EXACT)
        torch.testing.assert_close(scheduler.clean(mean, x, k), clean, **EXACT)


def test_a_gain_is_what_a_change_of_the_score_moves_the_mean_by(kind):
    """Another law's score at the same state: the means differ by the gain times the difference of the scores."""
    ready, prediction_type = kind
    scheduler, x = ready(), batch(16, 1, dtype=torch.float64)
    for k, (alpha, beta) in enumerate(zip(*levels(scheduler), strict=True)):
        means = [scheduler.transition(model_output(law, x, alpha, beta, prediction_type), x, k).mean for law in LAWS.values()]
        first, second = (scheduler.score(law.denoise(x, alpha, beta)[0], x, k) for law in LAWS.values())
        if alpha == 0:
            assert scheduler.gains[k].isinf()
        else:
            torch.testing.assert_close(means[0] - means[1], scheduler.gains[k] * (first - second), **EXACT)


def test_toward_a_point_is_the_mean_of_the_bridge_to_it(kind):
    """On the memoryless path X_{k+1} given x_k and x_1 is Gaussian: X_k = c X_{k+1} + fresh noise, by Bayes' rule."""
    scheduler, x, clean = kind[0]("ancestral"), batch(5, 1, dtype=torch.float64), batch(5, 1, dtype=torch.float64, seed=1)
    alphas, betas = levels(scheduler)
    for k in range(STEPS - 1):
        carried = alphas[k] / alphas[k + 1]
        fresh = betas[k] ** 2 - (carried * betas[k + 1]) ** 2
        gain = betas[k + 1] ** 2 * carried / betas[k] ** 2  # Cov(X_{k+1}, X_k | x_1)/Var(X_k | x_1)
        mean = alphas[k + 1] * clean + gain * (x - alphas[k] * clean)
        torch.testing.assert_close(scheduler.toward(clean, x, k), mean, **EXACT)
        assert math.isclose(float(scheduler.stds[k]), math.sqrt(betas[k + 1] ** 2 * fresh) / betas[k], rel_tol=1e-6)


def test_toward_and_score_are_affine_and_differentiable(kind):
    scheduler, x, y = kind[0](), batch(2, 3, dtype=torch.float64), batch(2, 3, dtype=torch.float64, seed=1)
    for f in (scheduler.toward, scheduler.clean, scheduler.score, scheduler.noised):
        inputs = (x.clone().requires_grad_(), y.clone().requires_grad_())
        assert torch.autograd.gradcheck(lambda a, b, f=f: f(a, b, 2), inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_arithmetic_is_wide(dtype):
    scheduler = MemorylessFlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(STEPS)
    for f in (scheduler.toward, scheduler.score, scheduler.noised):
        assert f(batch(1, 2, dtype=dtype), batch(1, 2, dtype=dtype), 1).dtype == torch.float32


def test_a_step_that_starts_without_noise_stays_and_has_no_score():
    scheduler = MemorylessFlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=[1.0, 0.5, 0.0])
    x = batch(1, 2)
    assert torch.equal(scheduler.toward(x + 1, x, 2), x)
    with pytest.raises(ValueError, match="step 2 starts without noise, where the data have no score"):
        scheduler.score(x, x, 2)
    with pytest.raises(ValueError, match="step 2 does not move its state"):
        scheduler.clean(x, x, 2)


@pytest.mark.parametrize("name", ["noised", "toward", "clean", "score"])
def test_bad_input(name):
    scheduler = MemorylessFlowMatchEulerDiscreteScheduler()
    with pytest.raises(ValueError, match="has no grid yet"):
        getattr(scheduler, name)(batch(1, 2), batch(1, 2), 0)
    scheduler.set_timesteps(STEPS)
    with pytest.raises(ValueError, match=f"index={STEPS} is not on the grid; pass a step from 0 to {STEPS - 1}"):
        getattr(scheduler, name)(batch(1, 2), batch(1, 2), STEPS)
    with pytest.raises(ValueError, match=r"has shape \(1, 3\) but \w+ \(1, 2\); they must agree"):
        getattr(scheduler, name)(batch(1, 3), batch(1, 2), 0)


@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
def test_the_score_of_almost_clean_data_comes_from_a_level_beside_the_grid(kind, law):
    ready, prediction_type = kind
    scheduler, x = ready(), batch(16, 1, dtype=torch.float64)
    before = {name: value.clone() for name, value in vars(scheduler.table).items()}
    ending = scheduler.ending_at(0.03)
    alpha, beta = float(ending.table.alpha[-1]), float(ending.table.beta[-1])
    # The model's own 1000 levels are .0004 apart there, and σ = .01 is the lowest of some of them.
    assert beta / (alpha + beta) == pytest.approx(0.03, abs=2e-3)
    leaf = x.clone().requires_grad_()
    near = GaussianMixture(law.weights, alpha * law.means, alpha**2 * law.covariances + beta**2)
    slope = torch.autograd.grad(near.log_prob(leaf).sum(), leaf)[0]
    output = model_output(law, x, alpha, beta, prediction_type)
    clean = ending.clean(ending.transition(output, x, STEPS - 1).mean, x, STEPS - 1)
    torch.testing.assert_close(ending.score(clean, x, STEPS - 1), slope, **EXACT)
    assert len(ending.timesteps) == STEPS and torch.equal(ending.timesteps[:-1], scheduler.timesteps[:-1])
    assert ending.timesteps[-1] != scheduler.timesteps[-1]
    for name, value in before.items():  # the scheduler itself is as it was
        assert torch.equal(getattr(scheduler.table, name), value)
        assert torch.equal(getattr(ending.table, name)[:-1], value[:-1])


@pytest.mark.parametrize("noise", [0.0, 1.0, -0.1])
def test_no_share_of_noise_is_refused(kind, noise):
    with pytest.raises(ValueError, match=f"noise={noise} is not a share of noise"):
        kind[0]().ending_at(noise)
