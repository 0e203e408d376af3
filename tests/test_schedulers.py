"""The memoryless schedulers as diffusers schedulers: configuration, hosts, full loops, corners of their tables, pipelines."""

import importlib

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from scheduler_problems import BETA_PREDICTIONS, BOTH, batch, mean_function, network, noise_levels, normal, ready
from tiny_pipelines import sd3, sd15

from diffusers_adjoint.schedulers import MemorylessDDIMScheduler, MemorylessFlowMatchEulerDiscreteScheduler, memoryless_scheduler
from diffusers_adjoint.schedulers.integrators import DEFAULT_INTEGRATOR, INTEGRATORS

# KDPM2 hands torch tensors to numpy, thousands of times.
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")

# --- Configuration: nothing of the host's gets lost ------------------------------------------------------------------------

FLOW_CONFIGS = [
    {"num_train_timesteps": 500},
    {"shift": 3.0},
    {"use_dynamic_shifting": True, "base_shift": 0.4, "max_shift": 1.3, "base_image_seq_len": 128, "max_image_seq_len": 2048},
    {"use_dynamic_shifting": True, "time_shift_type": "linear"},
    {"shift": 2.0, "shift_terminal": 0.1},
    {"use_karras_sigmas": True},
    {"use_exponential_sigmas": True},
    {"use_beta_sigmas": True, "shift": 3.0},
    {"invert_sigmas": True, "shift": 3.0},
]
SPACINGS = ["leading", "trailing", "linspace"]
SCALED = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
BETA_CONFIGS = [
    {},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"num_train_timesteps": 400, "beta_start": 0.001, "beta_end": 0.03},
    {"num_train_timesteps": 100, "trained_betas": [0.01 + 0.0001 * i for i in range(100)]},
    {"steps_offset": 1},
    {"prediction_type": "v_prediction"},
    *({"timestep_spacing": spacing} for spacing in SPACINGS),
]
BETA_HOSTS = [name for name in MemorylessDDIMScheduler._compatibles if name != "DPMSolverSinglestepScheduler"]  # has no spacing


@pytest.mark.parametrize("config", FLOW_CONFIGS)
def test_flow_from_config_has_the_parents_grid(config):
    parent = FlowMatchEulerDiscreteScheduler(**config)
    ours = MemorylessFlowMatchEulerDiscreteScheduler.from_config(parent.config)
    for name, value in config.items():
        assert ours.config[name] == value
    mu = 0.8 if parent.config.use_dynamic_shifting else None
    for scheduler in (parent, ours):
        scheduler.set_timesteps(7, mu=mu)
    assert torch.equal(ours.sigmas, parent.sigmas)
    assert torch.equal(ours.timesteps, parent.timesteps)
    assert len(ours.stds) == 7
    assert ours.stds.isfinite().all()


@pytest.mark.parametrize("config", BETA_CONFIGS)
@pytest.mark.parametrize("host", BETA_HOSTS)
def test_ddim_from_config_has_the_hosts_tables(host, config):
    # A value that the host was not given counts as a default, which diffusers' from_config replaces by the new class's own.
    config = SCALED | config
    host = getattr(diffusers, host)(**config)
    ours = MemorylessDDIMScheduler.from_config(host.config)
    for name, value in config.items():
        assert ours.config[name] == value
    assert torch.equal(ours.betas, host.betas)
    assert torch.equal(ours.alphas_cumprod, host.alphas_cumprod)


@pytest.mark.parametrize("cls", BOTH)
def test_back_to_the_parent_and_saved_and_loaded(cls, tmp_path):
    changed = {"shift": 3.0} if cls is BOTH[0] else {**SCALED, "set_alpha_to_one": False, "steps_offset": 1}
    scheduler = cls(**changed, integrator="ancestral")
    scheduler.save_pretrained(tmp_path)
    loaded = cls.from_pretrained(tmp_path)
    public = [{k: v for k, v in s.config.items() if not k.startswith("_")} for s in (scheduler, loaded)]
    assert public[0] == public[1]
    parent = cls.__bases__[0].from_pretrained(tmp_path)
    for s in (scheduler, loaded, parent):
        s.set_timesteps(6)
    assert torch.equal(parent.timesteps, scheduler.timesteps)
    for field in ("state", "output", "std", "clean_state", "clean_output"):
        assert torch.equal(getattr(loaded.table, field), getattr(scheduler.table, field))
    assert all(parent.config[name] == value for name, value in changed.items())


@pytest.mark.parametrize("cls", BOTH)
def test_a_pipeline_with_our_scheduler_is_saved_and_loaded(cls, tmp_path):
    # SD 1.5 wants steps_offset=1 and says so.
    pipeline = sd3(cls(integrator="euler")) if cls is BOTH[0] else sd15(cls(integrator="euler", steps_offset=1))
    pipeline.save_pretrained(tmp_path)
    # diffusers looks this name up in the scheduler's own module before it loads it.
    assert importlib.import_module(cls.__module__).SchedulerMixin is diffusers.SchedulerMixin
    loaded = DiffusionPipeline.from_pretrained(tmp_path).scheduler
    assert type(loaded) is cls
    assert loaded.config.integrator == "euler"


# --- The right class for every host ----------------------------------------------------------------------------------------


def test_flow_hosts_become_the_flow_scheduler():
    host = FlowMatchEulerDiscreteScheduler(shift=3.0, shift_terminal=0.1)
    host.set_shift(5.0)
    ours = memoryless_scheduler(host, "ancestral")
    for scheduler in (host, ours):
        scheduler.set_timesteps(5)
    assert torch.equal(ours.sigmas, host.sigmas)
    assert ours.config.integrator == "ancestral"
    assert memoryless_scheduler(ours).config.integrator == "ancestral"
    heun = memoryless_scheduler(diffusers.FlowMatchHeunDiscreteScheduler(shift=2.0))
    assert (type(heun), heun.shift, heun.config.integrator) == (BOTH[0], 2.0, DEFAULT_INTEGRATOR)


@pytest.mark.parametrize("host", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler"])
def test_solvers_of_flow_models_become_the_flow_scheduler(host):
    solver = getattr(diffusers, host)
    ours = memoryless_scheduler(solver(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0))
    assert (type(ours), ours.shift) == (BOTH[0], 3.0)
    host = solver(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    for scheduler in (host, ours):
        scheduler.set_timesteps(20)
        # At a timestep both have the same noise; these solvers round their timesteps to integers.
        torch.testing.assert_close(scheduler.sigmas[:-1], scheduler.timesteps / 1000, atol=1e-3, rtol=0, check_dtype=False)
    with pytest.raises(ValueError, match="prediction_type='epsilon'; only 'flow_prediction'"):
        memoryless_scheduler(solver(prediction_type="epsilon", use_flow_sigmas=True))


ALL_BETA_HOSTS = [
    *MemorylessDDIMScheduler._compatibles,
    "CogVideoXDDIMScheduler",
    "CogVideoXDPMScheduler",
    "DDIMParallelScheduler",
    "DDPMParallelScheduler",
    "DPMSolverSDEScheduler",
    "SASolverScheduler",
]


@pytest.mark.filterwarnings("ignore:clip_sample=True")
@pytest.mark.parametrize("config", [{}, SCALED, {**SCALED, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}])
@pytest.mark.parametrize("host", ALL_BETA_HOSTS)
def test_beta_schedule_hosts_become_ddim_with_their_noise_levels(host, config):
    host = getattr(diffusers, host)(**{k: v for k, v in config.items() if k in getattr(diffusers, host)().config})
    ours = memoryless_scheduler(host)
    assert type(ours) is MemorylessDDIMScheduler
    # Equal to rounding; solvers that divide by √ᾱ lift a zero ᾱ_T to 2⁻²⁴ = 6·10⁻⁸.
    torch.testing.assert_close(ours.alphas_cumprod, host.alphas_cumprod.float(), atol=1e-7, rtol=1e-5)
    for name in ("timestep_spacing", "steps_offset", "prediction_type", "set_alpha_to_one"):
        if name in host.config:  # their defaults differ from DDIM's, so this is not a matter of course
            assert ours.config[name] == host.config[name]


@pytest.mark.filterwarnings("ignore:clip_sample=True")
@pytest.mark.parametrize("name", ["sigmoid", "laplace"])
def test_a_beta_schedule_that_ddim_cannot_name_is_kept(name):
    host = diffusers.DDPMScheduler(beta_schedule=name)
    torch.testing.assert_close(memoryless_scheduler(host).alphas_cumprod, host.alphas_cumprod, atol=1e-7, rtol=1e-4)


def test_what_a_host_says_about_its_grid_is_kept_or_told():
    assert memoryless_scheduler(EulerDiscreteScheduler(final_sigmas_type="sigma_min")).config.set_alpha_to_one is False
    with pytest.warns(UserWarning, match="use_karras_sigmas=True of EulerDiscreteScheduler"):
        memoryless_scheduler(EulerDiscreteScheduler(use_karras_sigmas=True))


UNSUPPORTED = [
    diffusers.LCMScheduler(),
    diffusers.TCDScheduler(),
    diffusers.FlowMatchLCMScheduler(),
    diffusers.CMStochasticIterativeScheduler(),
    diffusers.EDMEulerScheduler(),
    diffusers.EDMDPMSolverMultistepScheduler(),
    diffusers.DDIMInverseScheduler(),
    EulerDiscreteScheduler(timestep_type="continuous", prediction_type="v_prediction"),
]


@pytest.mark.parametrize("host", UNSUPPORTED, ids=lambda host: type(host).__name__)
def test_hosts_without_a_memoryless_counterpart_are_refused(host):
    with pytest.raises(ValueError, match=f"{type(host).__name__} has no memoryless counterpart; use a model"):
        memoryless_scheduler(host)


# --- Full loops ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [2, 10, 61])  # with 61, diffusers' own "trailing" grid runs on to timestep −1
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction_type", BETA_PREDICTIONS)
def test_ddim_full_loop_finds_narrow_data(prediction_type, spacing, steps):
    scheduler = ready(
        BOTH[1], steps, prediction_type=prediction_type, timestep_spacing=spacing, set_alpha_to_one=False, integrator="ancestral"
    )
    assert len(scheduler.timesteps) == steps
    assert (scheduler.timesteps.diff() < 0).all()
    assert int(scheduler.timesteps[-1]) >= 0
    output, x = network(scheduler, normal(0.7, 1e-6)), batch(64, 1, dtype=torch.float64)
    for k, t in enumerate(scheduler.timesteps):
        x = scheduler.step(output(k, x), t, x, generator=torch.Generator().manual_seed(k)).prev_sample
    # The grid ends at ᾱ[0] = 1 − 1e-4, where noise of std .01 is left.
    assert (x - 0.7).abs().max() < 0.06


@pytest.mark.parametrize("integrator", INTEGRATORS)
@pytest.mark.parametrize("config", FLOW_CONFIGS[:-1])
def test_flow_full_loop_finds_narrow_data(config, integrator):
    scheduler = BOTH[0](**config, integrator=integrator)
    scheduler.set_timesteps(100, mu=0.8 if scheduler.config.use_dynamic_shifting else None)
    output, x = network(scheduler, normal(0.7, 0.01)), batch(64, 1, dtype=torch.float64)
    for k, t in enumerate(scheduler.timesteps):
        x = scheduler.step(output(k, x), t, x, generator=torch.Generator().manual_seed(k)).prev_sample
    assert x.isfinite().all()
    assert (x - 0.7).abs().max() < 0.6  # 64 draws stay within about three of their stds of .1, up to the step size


# --- Corners of the host's tables ------------------------------------------------------------------------------------------


def test_steps_offset_moves_the_timesteps():
    offsets = [ready(BOTH[1], 10, steps_offset=o) for o in (0, 1)]
    assert torch.equal(offsets[1].timesteps, offsets[0].timesteps + 1)
    assert not torch.equal(offsets[1].stds, offsets[0].stds)


def test_zero_terminal_snr():
    config = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", **SCALED}
    for prediction_type, integrator in [("v_prediction", "ancestral"), ("sample", "posterior")]:
        scheduler = ready(BOTH[1], 5, prediction_type=prediction_type, integrator=integrator, **config)
        alpha = float(noise_levels(scheduler)[0][1])
        # Pure noise says nothing about the data: the mean is that of the next state, whatever x_0.
        mean = mean_function(scheduler, normal(0.7))(0, torch.tensor([[-2.0], [2.0]], dtype=torch.float64))
        torch.testing.assert_close(mean, torch.full_like(mean, 0.7 * alpha), atol=1e-12, rtol=0)  # float64 rounding
    with pytest.raises(ValueError, match="zero terminal SNR.*use a 'v_prediction' or 'sample' model"):
        ready(BOTH[1], 5, **config)
    assert ready(BOTH[1], 5, **config | {"timestep_spacing": "leading"}).stds.isfinite().all()  # never meets timestep 999


def test_a_step_of_no_length_does_nothing():
    # "linspace" ends at timestep 0, and without set_alpha_to_one that is where the grid ends too.
    scheduler = ready(BOTH[1], 4, timestep_spacing="linspace", set_alpha_to_one=False)
    x, m = batch(2, 3), batch(2, 3, seed=1)
    step = scheduler.transition(m, x, 3)
    assert step.std == 0.0
    torch.testing.assert_close(step.mean, x)
    flow = BOTH[0]()
    flow.set_timesteps(sigmas=[1.0, 0.5, 0.0])  # and then the 0 that the parent appends
    assert torch.equal(flow.transition(m, x, 2).mean, x)
    assert flow.stds[2] == 0


def test_clipping_is_switched_off_with_a_warning():
    for option in ("clip_sample", "thresholding"):
        with pytest.warns(UserWarning, match=f"{option}=True is switched off"):
            scheduler = BOTH[1](**{option: True})
        assert scheduler.config[option] is False
        assert BOTH[1].from_config(scheduler.config).config[option] is False
    with pytest.warns(UserWarning, match="clip_sample=True is switched off"):
        memoryless_scheduler(DDIMScheduler())


def misuse(cls, call, **config):
    scheduler = ready(cls, 4, **config)
    return lambda: call(scheduler, batch(2, 3))


BAD = {
    "unknown integrator": (lambda: BOTH[0](integrator="heun"), "integrator='heun' is unknown; pass one of 'euler'"),
    "unknown integrator, DDIM": (lambda: BOTH[1](integrator="heun"), "integrator='heun' is unknown; pass one of 'euler'"),
    "stochastic sampling": (lambda: BOTH[0](stochastic_sampling=True), "pass stochastic_sampling=False"),
    "flow model in DDIM": (lambda: BOTH[1](prediction_type="flow_prediction"), "prediction_type='flow_prediction' is unknown"),
    "no grid": (lambda: BOTH[0]().stds, "no grid yet; call set_timesteps"),
    "no grid, DDIM": (lambda: BOTH[1]().step(torch.zeros(1), 999, torch.zeros(1)), "no grid yet; call set_timesteps"),
    "growing noise": (lambda: BOTH[0]().set_timesteps(sigmas=[1.0, 0.2, 0.5]), "the noise grows along the grid at step 1"),
    "noise beyond one": (lambda: BOTH[0]().set_timesteps(sigmas=[80.0, 1.0, 0.5]), "starts at σ = 80, but flow matching"),
    "beyond the table": (lambda: ready(BOTH[1], 1000, steps_offset=1), "reach timestep 1000, but the model has 1000"),
    "integer timestep": (misuse(BOTH[0], lambda s, x: s.step(x, 3, x)), "timestep=3 is an integer"),
    "off the grid": (misuse(BOTH[1], lambda s, x: s.step(x, 3, x)), "timestep=3 is not on the grid"),
    "eta": (misuse(BOTH[1], lambda s, x: s.step(x, 750, x, eta=1.0)), "eta would choose another sampler's step"),
    "index below": (misuse(BOTH[0], lambda s, x: s.transition(x, x, -1)), "index=-1 is not on the grid; pass a step from 0 to 3"),
    "index above": (misuse(BOTH[1], lambda s, x: s.transition(x, x, 4)), "index=4 is not on the grid; pass a step from 0 to 3"),
    "learned variance": (misuse(BOTH[1], lambda s, x: s.transition(torch.cat([x, x], 1), x, 0)), r"shape \(2, 6\) but sample"),
}


@pytest.mark.parametrize("name", BAD)
def test_misuse_is_told_in_one_sentence(name):
    call, message = BAD[name]
    with pytest.raises(ValueError, match=message) as raised:
        call()
    assert "\n" not in str(raised.value)


# --- Inside real pipelines -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [sd3, sd15])
def test_a_real_pipeline_samples_with_it(build):
    pipeline = build()
    pipeline.scheduler = memoryless_scheduler(pipeline.scheduler)
    pipeline.set_progress_bar_config(disable=True)

    def latents(start, noise):
        pipeline.scheduler.set_generator(torch.Generator().manual_seed(noise))
        generator = torch.Generator().manual_seed(start)
        return pipeline("a cat", num_inference_steps=4, output_type="latent", generator=generator).images

    first = latents(0, 0)
    assert first.isfinite().all()
    assert torch.equal(latents(0, 0), first)
    assert not torch.equal(latents(1, 0), first)
    # SD 1.5 passes its generator on, and that one goes first; SD3 leaves the noise to set_generator.
    assert torch.equal(latents(0, 1), first) == (build is sd15)


def test_a_pipeline_follows_the_transitions():
    """The chain a real SD3 pipeline runs, recomputed from the recorded network outputs."""
    pipeline = sd3()
    pipeline.scheduler = scheduler = memoryless_scheduler(pipeline.scheduler)
    pipeline.set_progress_bar_config(disable=True)
    scheduler.set_generator(torch.Generator().manual_seed(1))
    record, step = [], scheduler.step

    def recording(model_output, timestep, sample, **kwargs):
        out = step(model_output, timestep, sample, **kwargs)
        record.append((model_output, sample, out[0]))
        return out

    scheduler.step = recording
    pipeline("a cat", num_inference_steps=4, output_type="latent", generator=torch.Generator().manual_seed(0))
    noise = torch.Generator().manual_seed(1)
    for k, (m, x, x_next) in enumerate(record):
        law = scheduler.transition(m, x, k)
        expected = law.mean if k == 3 else law.sample(torch.randn(x.shape, generator=noise))
        assert torch.equal(x_next, expected)
    assert len(record) == 4
