"""Transitions of the memoryless schedulers against diffusers' own DDIM, closed forms of Gaussian data, and each other."""

import inspect
import warnings

import pytest
import torch
from diffusers import DDIMScheduler
from problems import AffineChain, mixture_1d, model_output
from scheduler_problems import BETA_PREDICTIONS, BOTH, batch, mean_function, network, noise_levels, normal, ready

from diffusers_adjoint.core.matching import matching_loss
from diffusers_adjoint.schedulers import (
    MemorylessDDIMScheduler,
    MemorylessEDMEulerScheduler,
    MemorylessFlowMatchEulerDiscreteScheduler,
)
from diffusers_adjoint.schedulers.integrators import INTEGRATORS
from diffusers_adjoint.schedulers.memoryless import transition_table

SCALED = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
# A few float64 operations on numbers of order one; the float32 rounding of diffusers' tables is the same on both sides.
EXACT = {"atol": 1e-12, "rtol": 1e-10}
# diffusers computes in float32 from a float32 table; √ᾱ ≥ .006 is divided by, so one part in 10⁷ grows to 2·10⁻⁵.
FLOAT32 = {"atol": 2e-5, "rtol": 1e-4}


@pytest.mark.parametrize("prediction_type", BETA_PREDICTIONS)
@pytest.mark.parametrize("config", [SCALED, {**SCALED, "set_alpha_to_one": False}, {**SCALED, "timestep_spacing": "trailing"}])
def test_ancestral_is_diffusers_ddim_with_eta_one(config, prediction_type):
    steps = 20  # divides 1000: only then does diffusers' DDIM step from grid point to grid point
    parent = ready(DDIMScheduler, steps, prediction_type=prediction_type, clip_sample=False, **config)
    ours = ready(MemorylessDDIMScheduler, steps, prediction_type=prediction_type, integrator="ancestral", **config)
    for k, t in enumerate(parent.timesteps):
        x, m, zero = batch(2, 3, seed=k), batch(2, 3, seed=100 + k), torch.zeros(2, 3)
        theirs = parent.step(m, t, x, eta=1.0, variance_noise=zero)
        step = ours.transition(m, x, k)
        torch.testing.assert_close(step.mean, theirs.prev_sample, **FLOAT32)
        # A difference of two ᾱ near 1 in float32, under a square root: 1e-7 becomes 3e-4 where the variance is about 0.
        variance = float(parent._get_variance(int(t), int(t) - 1000 // steps))
        assert step.std**2 == pytest.approx(variance, abs=1e-6, rel=1e-4)
        torch.testing.assert_close(ours.step(m, t, x).pred_original_sample, theirs.pred_original_sample, **FLOAT32)


@pytest.mark.parametrize("integrator", INTEGRATORS)
@pytest.mark.parametrize("prediction_type", BETA_PREDICTIONS)
def test_a_beta_schedule_is_the_flow_path_in_other_coordinates(prediction_type, integrator):
    """x/(α + β) moves as under flow matching at t = α/(α + β), step by step, whatever the network predicts."""
    law = mixture_1d([0.3, 0.7], [-1.0, 0.8], [0.2, 0.5])
    vp = ready(MemorylessDDIMScheduler, 12, prediction_type=prediction_type, integrator=integrator, timestep_spacing="trailing")
    alphas, betas = noise_levels(vp)
    scale, t = alphas + betas, alphas / (alphas + betas)
    flow = transition_table(t, 1 - t, "flow_prediction", integrator)
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    for k in range(12):
        step = vp.transition(network(vp, law)(k, x), x, k)
        y = x / scale[k]
        m = model_output(law, y, float(t[k]), float(1 - t[k]), "flow_prediction")
        # 1e-10: α ≥ .006 is divided by, in float64.
        torch.testing.assert_close(step.mean / scale[k + 1], flow.state[k] * y + flow.output[k] * m, atol=1e-10, rtol=1e-10)
        assert step.std / float(scale[k + 1]) == pytest.approx(float(flow.std[k]), abs=1e-10)


@pytest.mark.parametrize("cls", BOTH)
def test_posterior_is_exact_for_data_of_unit_variance(cls):
    """Every step is the conditional law of the memoryless process, so the chain has the right law at every time."""
    scheduler = ready(cls, 6, integrator="posterior")
    law = normal(0.7, 1.0)
    alphas, betas = noise_levels(scheduler)
    mean, std = mean_function(scheduler, law), scheduler.stds
    at = AffineChain.of(mean, std, 1)
    variance, centre = alphas[0] ** 2 + betas[0] ** 2, alphas[0] * 0.7
    for k in range(6):
        centre = at.jacobians[k, 0, 0] * centre + at.offsets[k, 0]
        variance = at.jacobians[k, 0, 0] ** 2 * variance + std[k] ** 2
        torch.testing.assert_close(centre, alphas[k + 1] * 0.7, atol=1e-10, rtol=0)
        torch.testing.assert_close(variance, alphas[k + 1] ** 2 + betas[k + 1] ** 2, atol=1e-10, rtol=0)
        # Joint law of two times: Cov = (α_k/α_{k+1}) Var(x_{k+1}), since noise is only added backwards.
        ratio = alphas[k] / alphas[k + 1]
        slope = ratio * (alphas[k + 1] ** 2 + betas[k + 1] ** 2) / (alphas[k] ** 2 + betas[k] ** 2)
        torch.testing.assert_close(at.jacobians[k, 0, 0], slope, atol=1e-10, rtol=0)


def test_ancestral_is_exact_for_a_point():
    scheduler = ready(BOTH[0], 6, integrator="ancestral")
    sigmas, law = scheduler.sigmas.double(), normal(0.7, 1e-12)
    chain = AffineChain.of(mean_function(scheduler, law), scheduler.stds, 1)
    variance = torch.tensor(1.0, dtype=torch.float64)
    for k in range(6):
        variance = chain.jacobians[k, 0, 0] ** 2 * variance + scheduler.stds[k] ** 2
        # The data's 1e-12 is divided by σ² ≥ 1e-6 at the last step.
        assert float(variance) == pytest.approx(float(sigmas[k + 1]) ** 2, abs=1e-5)


@pytest.mark.parametrize("integrator", INTEGRATORS)
@pytest.mark.parametrize("cls", BOTH)
def test_the_base_law_converges(cls, integrator):
    """On Gaussian data the chain is affine: its exact terminal law against the data, with K and 4K steps."""

    def error(steps):
        scheduler = ready(cls, steps, integrator=integrator, **({"timestep_spacing": "trailing"} if cls is BOTH[1] else {}))
        chain = AffineChain.of(mean_function(scheduler, normal()), scheduler.stds, 1)
        start = torch.zeros(1, dtype=torch.float64), torch.eye(1, dtype=torch.float64)
        end = chain.terminal_law(*start)
        return float((end.means - 0.7).abs()) + float((end.covariances - 0.36).abs())

    coarse, fine = error(50), error(200)
    # First order means a quarter; .4 leaves room for the next order. What does not shrink: the β-schedule's α_0 = .006, and the
    # rounding of sigmas to float32.
    assert fine < max(0.4 * coarse, 1e-4)
    assert fine < 0.03


LEFT_OVER = {"euler": 1, "local_linear": 1, "compensated": 2, "ancestral": 0, "posterior": 0}


@pytest.mark.parametrize("integrator", INTEGRATORS)
def test_what_the_last_step_leaves_of_the_noise(integrator):
    """x̂_K = x̂_1 − c h x̂_0 to first order in the last step h, with c as `integrators` says: 0 for a clean end point."""
    h = 1e-4
    scheduler = BOTH[0](integrator=integrator)
    scheduler.set_timesteps(sigmas=[1.0, h])
    data, noise = torch.tensor([3.0, 0.0]).double(), torch.tensor([0.0, 1.0]).double()
    sigma = float(scheduler.sigmas[1])
    end = scheduler.transition(noise - data, (1 - sigma) * data + sigma * noise, 1).mean
    # Next order: h = 1e-4 relative for the noise, h² for the data.
    assert float(end[1]) == pytest.approx(-LEFT_OVER[integrator] * sigma, rel=1e-3, abs=1e-12)
    assert float(end[0]) == pytest.approx(3.0, abs=1e-6)


def test_a_term_of_the_loss_is_the_paper_s_times_half_the_length_of_the_step():
    """‖(2/σ)(v − v_base) + σ ã‖² (eq. 42) with σ² = 2(1 − t + h)/(t + h) (eq. 236). So its clipping threshold, too."""
    steps = 40
    scheduler = BOTH[0](integrator="euler")
    scheduler.set_timesteps(sigmas=[1 - k / steps for k in range(steps)])
    x, velocity, base_velocity, adjoint = (
        torch.randn(3, 5, generator=torch.Generator().manual_seed(i)).double() for i in range(4)
    )
    h = 1 / steps
    for k in range(steps):
        t = k * h
        sigma = (2 * (1 - t + h) / (t + h)) ** 0.5
        term = ((2 / sigma) * (velocity - base_velocity) + sigma * adjoint).square().sum(1)
        mean, base_mean = (scheduler.transition(-v, x, k).mean for v in (velocity, base_velocity))
        loss = matching_loss(mean, base_mean, scheduler.stds[k], adjoint)
        # diffusers keeps its sigmas in float32: 6e-8 of 1 is 3e-6 of the last step's h.
        torch.testing.assert_close(2 * loss, h * term, atol=0, rtol=1e-4)


def test_inverted_sigmas_are_the_same_sampler():
    """Mochi counts σ from 0 (noise) to 1 (data), and its network predicts X_1 − X_0."""
    plain, inverted = ready(BOTH[0], 5, shift=3.0), ready(BOTH[0], 5, shift=3.0, invert_sigmas=True)
    x, m = batch(2, 3, dtype=torch.float64), batch(2, 3, dtype=torch.float64, seed=1)
    torch.testing.assert_close(inverted.sigmas, 1 - plain.sigmas)
    for k in range(5):
        ours, theirs = inverted.transition(-m, x, k), plain.transition(m, x, k)
        # 1 − σ is rounded to float32 once more.
        torch.testing.assert_close(ours.mean, theirs.mean, atol=1e-6, rtol=1e-6)
        assert ours.std == pytest.approx(theirs.std, rel=1e-5)


# --- transition and step ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", BOTH)
def test_transition_is_differentiable_and_pure(cls):
    scheduler = ready(cls, 5)
    x, m = (batch(2, 3, dtype=torch.float64, seed=s).requires_grad_() for s in (0, 1))
    for k in (4, 0, 2):
        assert torch.autograd.gradcheck(lambda m, x, k=k: scheduler.transition(m, x, k).mean, (m, x))
        slope = torch.autograd.grad(scheduler.transition(m, x, k).mean.sum(), x)[0]
        assert torch.equal(slope, scheduler.table.state[k].expand(2, 3))
    assert getattr(scheduler, "_step_index", None) is None


@pytest.mark.parametrize("cls", BOTH)
def test_step_draws_from_the_transition(cls):
    scheduler = ready(cls, 6)
    x, m = batch(2, 3), batch(2, 3, seed=1)
    order = range(6) if cls is BOTH[0] else [4, 0, 5, 2, 2]  # the flow parent counts its steps, DDIM finds them by timestep
    for k in order:
        drawn = scheduler.step(m, scheduler.timesteps[k], x, generator=torch.Generator().manual_seed(k)).prev_sample
        step = scheduler.transition(m, x, k)
        noise = torch.randn(2, 3, generator=torch.Generator().manual_seed(k))
        assert torch.equal(drawn, step.mean if k == 5 else step.sample(noise))  # the end point is noiseless
    assert scheduler.stds[-1] > 0


def test_flow_step_starts_where_the_pipeline_says():
    scheduler = ready(BOTH[0], 6)
    x, m = batch(2, 3), batch(2, 3, seed=1)
    for begin in (None, 3):
        scheduler.set_timesteps(6)
        if begin is not None:
            scheduler.set_begin_index(begin)
        out = scheduler.step(m, scheduler.timesteps[3], x, generator=torch.Generator().manual_seed(0))
        assert scheduler.step_index == 4
        noise = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
        assert torch.equal(out.prev_sample, scheduler.transition(m, x, 3).sample(noise))


@pytest.mark.parametrize("cls", BOTH)
def test_tuple_output(cls):
    scheduler = ready(cls, 4)
    x, m, t = batch(2, 3), batch(2, 3, seed=1), scheduler.timesteps[0]
    out = scheduler.step(m, t, x, generator=torch.Generator().manual_seed(0))
    scheduler.set_timesteps(4)
    as_tuple = scheduler.step(m, t, x, generator=torch.Generator().manual_seed(0), return_dict=False)
    parent = ready(cls.__bases__[0], 4)
    assert type(out) is type(parent.step(m, t, x))
    assert len(as_tuple) == len(parent.step(m, parent.timesteps[1], x, return_dict=False))
    assert all(torch.equal(a, b) for a, b in zip(as_tuple, out.values(), strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("cls", BOTH)
def test_the_samples_dtype_is_kept_and_the_arithmetic_is_wide(cls, dtype):
    scheduler = ready(cls, 6)
    x, m = batch(2, 3, dtype=dtype), batch(2, 3, dtype=dtype, seed=1)
    wide = torch.promote_types(dtype, torch.float32)
    step = scheduler.transition(m, x, 2)
    assert step.mean.dtype == wide
    assert torch.equal(step.mean, scheduler.transition(m.to(wide), x.to(wide), 2).mean)
    assert scheduler.transition(m.double(), x, 2).mean.dtype == wide  # the state decides, not the network
    noise = torch.randn(2, 3, generator=torch.Generator().manual_seed(0), dtype=wide)
    t = scheduler.timesteps[2]
    drawn = scheduler.step(m, t, x, generator=torch.Generator().manual_seed(0))
    assert all(value.dtype == dtype for value in drawn.values())
    assert torch.equal(drawn.prev_sample, step.sample(noise).to(dtype))  # the same noise as in float32, rounded once
    exact = scheduler.transition(m.double(), x.double(), 2)
    torch.testing.assert_close(step.mean.double(), exact.mean, atol=1e-6, rtol=1e-6)  # float32 rounding
    assert (scheduler.stds.dtype, scheduler.stds.device.type) == (torch.float64, "cpu")


@pytest.mark.parametrize("cls", BOTH)
def test_generators(cls):
    scheduler = ready(cls, 4)
    x, m = batch(3, 2, 2), batch(3, 2, 2, seed=1)

    def draw(generator=None):
        scheduler.set_timesteps(4)
        return scheduler.step(m, scheduler.timesteps[0], x, generator=generator).prev_sample

    def seeded(*seeds):
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    together = draw(seeded(5, 6, 7))
    row = scheduler.transition(m[1:2], x[1:2], 0).sample(torch.randn(1, 2, 2, generator=seeded(6)[0]))
    assert torch.equal(together[1:2], row)  # a sample's noise is its generator's, in whatever batch
    scheduler.set_generator(seeded(5, 6, 7))
    assert torch.equal(draw(), together)
    scheduler.set_generator(seeded(8)[0])
    first, second = draw(), draw()
    assert not torch.equal(first, second)  # it advances
    scheduler.set_generator(seeded(8)[0])
    assert torch.equal(draw(), first)
    assert torch.equal(draw(seeded(5, 6, 7)), together)  # one that is passed goes first
    scheduler.set_generator(None)
    torch.manual_seed(3)
    from_global = draw()
    torch.manual_seed(3)
    assert torch.equal(draw(), from_global)
    with pytest.raises(ValueError, match="2 generators do not fit a batch of 3"):
        draw(seeded(1, 2))


CLASSES = [MemorylessFlowMatchEulerDiscreteScheduler, MemorylessDDIMScheduler, MemorylessEDMEulerScheduler]


@pytest.mark.parametrize("cls", CLASSES)
def test_step_keeps_the_order_and_the_defaults_of_its_parents_arguments(cls):
    ours, parents = (list(inspect.signature(c.step).parameters.values()) for c in (cls, cls.__mro__[1]))
    assert [p.name for p in ours] == [p.name for p in parents]
    assert [p.default for p in ours] == [p.default for p in parents]
    assert {p.kind for p in ours} == {inspect.Parameter.POSITIONAL_OR_KEYWORD}


@pytest.mark.parametrize(("cls", "used"), [(CLASSES[0], "s_churn"), (CLASSES[1], "eta"), (CLASSES[2], "s_churn")])
def test_the_fourth_argument_is_the_parents(cls, used):
    """diffusers' own tests pass it by position: step(output, timestep, sample, eta)."""
    scheduler = ready(cls, 4)
    x, t = batch(2, 3), scheduler.timesteps[0]
    torch.manual_seed(0)
    out = scheduler.step(x, t, x, 0.0).prev_sample
    scheduler.set_timesteps(4)
    assert torch.equal(out, scheduler.step(x, t, x, generator=torch.manual_seed(0)).prev_sample)
    with pytest.raises(ValueError, match=f"{used} would choose another sampler's step"):
        scheduler.step(x, t, x, 0.5)


@pytest.mark.parametrize("cls", CLASSES)
def test_noise_that_no_seed_of_the_pipeline_repeats_is_said_once(cls):
    scheduler = ready(cls, 4)
    x, t = batch(2, 3), scheduler.timesteps
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        scheduler.step(x, t[0], x, generator=torch.Generator())
        assert not told
        scheduler.step(x, t[1], x)
        scheduler.step(x, t[2], x)
        scheduler.step(x, t[3], x)  # the last step draws nothing
    assert [str(w.message).partition(";")[0] for w in told] == [
        f"{cls.__name__} draws its noise from torch's global generator, because the pipeline passed none to step"
    ]
