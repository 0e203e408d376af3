"""The memoryless EDM scheduler against the hosts it stands for, closed forms, and the flow path in other coordinates."""

import math

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline
from problems import AffineChain, mixture_1d, model_output
from scheduler_problems import batch, normal
from tiny_conditioned import stable_video_scheduler
from tiny_pipelines import sd15

from diffusers_adjoint.schedulers import MemorylessEDMEulerScheduler, memoryless_scheduler
from diffusers_adjoint.schedulers.integrators import INTEGRATORS
from diffusers_adjoint.schedulers.memoryless import transition_table

UNIT = {"prediction_type": "v_prediction", "sigma_data": 1.0}
HOSTS = {
    "Stable Audio": lambda: diffusers.CosineDPMSolverMultistepScheduler(sigma_min=0.3, sigma_max=500),
    "EDM solver": lambda: diffusers.EDMDPMSolverMultistepScheduler(**UNIT, sigma_schedule="exponential"),
    "EDM Euler": lambda: diffusers.EDMEulerScheduler(**UNIT, rho=5.0),
}


def ready(steps=8, **config):
    scheduler = MemorylessEDMEulerScheduler(**config)
    scheduler.set_timesteps(steps)
    return scheduler


def noise_levels(scheduler):
    alphas = 1 / (1 + scheduler.sigmas.double() ** 2).sqrt()
    return alphas, scheduler.sigmas.double() * alphas


@pytest.mark.parametrize("host", [*HOSTS.values(), stable_video_scheduler], ids=[*HOSTS, "Stable Video"])
def test_hosts_keep_their_grid_and_what_their_network_takes_for_it(host):
    host = host()
    ours = memoryless_scheduler(host, "ancestral")
    assert type(ours) is MemorylessEDMEulerScheduler
    assert ours.config.integrator == "ancestral"
    for scheduler in (host, ours):
        scheduler.set_timesteps(9)
    # One of them computes its float32 grid in float64.
    torch.testing.assert_close(ours.sigmas, host.sigmas, rtol=1e-6, atol=0)
    torch.testing.assert_close(ours.timesteps, host.timesteps, rtol=1e-6, atol=1e-6)
    assert len(ours.stds) == 9
    assert (ours.stds[:-1] > 0).all()


@pytest.mark.parametrize("host", HOSTS.values(), ids=HOSTS)
def test_the_predicted_data_is_the_hosts(host):
    host = host()
    ours = memoryless_scheduler(host)
    for scheduler in (host, ours):
        scheduler.set_timesteps(5)
    y, m = batch(2, 3), batch(2, 3, seed=1)
    for k, t in enumerate(ours.timesteps):
        x = y * (1 + host.sigmas[k] ** 2).sqrt()  # the host's state
        torch.testing.assert_close(host.precondition_inputs(x, host.sigmas[k]), y)
        clean = ours.step(m, t, y).pred_original_sample
        # float32 on numbers of order one; the host multiplies x by 1/(1 + σ²).
        torch.testing.assert_close(clean, host.precondition_outputs(x, m, host.sigmas[k]), rtol=1e-5, atol=1e-5)


def test_stable_videos_predicted_data_is_the_hosts():
    host = stable_video_scheduler()
    ours = memoryless_scheduler(host)
    for scheduler in (host, ours):
        scheduler.set_timesteps(5)
    y, m = batch(2, 3), batch(2, 3, seed=1)
    for k, t in enumerate(host.timesteps):
        theirs = host.step(m, t, y * (1 + host.sigmas[k] ** 2).sqrt())
        torch.testing.assert_close(ours.step(m, ours.timesteps[k], y).pred_original_sample, theirs[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("integrator", INTEGRATORS)
def test_it_is_the_flow_path_in_other_coordinates(integrator):
    law = mixture_1d([0.3, 0.7], [-1.0, 0.8], [0.2, 0.5])
    scheduler = ready(12, integrator=integrator)
    alphas, betas = noise_levels(scheduler)
    scale, t = alphas + betas, alphas / (alphas + betas)
    flow = transition_table(t, 1 - t, "flow_prediction", integrator)
    y = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    for k in range(12):
        x = scale[k] * y
        step = scheduler.transition(model_output(law, x, float(alphas[k]), float(betas[k]), "v_prediction"), x, k)
        m = model_output(law, y, float(t[k]), float(1 - t[k]), "flow_prediction")
        # float64; α ≥ .012 is divided by.
        torch.testing.assert_close(step.mean / scale[k + 1], flow.state[k] * y + flow.output[k] * m, atol=1e-10, rtol=1e-10)
        assert step.std / float(scale[k + 1]) == pytest.approx(float(flow.std[k]), abs=1e-10)


def test_posterior_is_exact_for_data_of_unit_variance():
    scheduler, law = ready(6, sigma_max=500.0), normal(0.7, 1.0)
    alphas, betas = noise_levels(scheduler)

    def mean(k, x):
        return scheduler.transition(model_output(law, x, float(alphas[k]), float(betas[k]), "v_prediction"), x, k).mean

    chain = AffineChain.of(mean, scheduler.stds, 1)
    centre, variance = alphas[0] * 0.7, torch.tensor(1.0, dtype=torch.float64)
    for k in range(6):
        centre = chain.jacobians[k, 0, 0] * centre + chain.offsets[k, 0]
        variance = chain.jacobians[k, 0, 0] ** 2 * variance + scheduler.stds[k] ** 2
        torch.testing.assert_close(centre, alphas[k + 1] * 0.7, atol=1e-10, rtol=0)  # float64 rounding
        assert variance == pytest.approx(1.0, abs=1e-10)


def test_a_full_loop_finds_narrow_data():
    scheduler, law = ready(60, integrator="ancestral", noise_conditioning="atan", sigma_schedule="exponential"), normal(0.7, 1e-6)
    alphas, betas = noise_levels(scheduler)
    x = batch(64, 1, dtype=torch.float64) * scheduler.init_noise_sigma
    for k, t in enumerate(scheduler.timesteps):
        seen = scheduler.scale_model_input(x, t)
        output = model_output(law, seen, float(alphas[k]), float(betas[k]), "v_prediction")
        x = scheduler.step(output, t, x, generator=torch.Generator().manual_seed(k)).prev_sample
    assert (x - 0.7).abs().max() < 0.01  # the data's own std is .001


def test_saved_with_a_pipeline_and_loaded(tmp_path):
    sd15(MemorylessEDMEulerScheduler(noise_conditioning="atan", integrator="euler")).save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path).scheduler
    assert type(loaded) is MemorylessEDMEulerScheduler
    assert (loaded.config.noise_conditioning, loaded.config.integrator) == ("atan", "euler")
    loaded.set_timesteps(3)
    torch.testing.assert_close(loaded.timesteps, 2 / math.pi * loaded.sigmas[:-1].atan())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: MemorylessEDMEulerScheduler(prediction_type="epsilon"), "prediction_type='epsilon' is not supported"),
        (lambda: MemorylessEDMEulerScheduler(sigma_data=0.5), "sigma_data=0.5 is not supported; pass 1.0"),
        (lambda: MemorylessEDMEulerScheduler(final_sigmas_type="sigma_min"), "final_sigmas_type='sigma_min' is not supported"),
        (lambda: MemorylessEDMEulerScheduler(noise_conditioning="cos"), "noise_conditioning='cos' is unknown; pass 'log'"),
        (lambda: MemorylessEDMEulerScheduler(integrator="heun"), "integrator='heun' is unknown"),
        (lambda: ready().step(torch.zeros(1), 0.123, torch.zeros(1)), "timestep=0.123 is not on the grid"),
        (
            lambda: memoryless_scheduler(
                diffusers.EulerDiscreteScheduler(
                    timestep_type="continuous", use_karras_sigmas=True, prediction_type="v_prediction"
                )
            ),
            "no memoryless counterpart",
        ),
        (lambda: memoryless_scheduler(diffusers.EDMEulerScheduler(prediction_type="v_prediction")), "no memoryless counterpart"),
    ],
)
def test_misuse_is_told_in_one_sentence(call, message):
    with pytest.raises(ValueError, match=message) as raised:
        call()
    assert "\n" not in str(raised.value)
