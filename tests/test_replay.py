"""Replay against the pipeline's own, public call: the same numbers bit for bit, with gradients, and nothing left behind."""

import copy
import gc
import weakref

import pytest
import torch
from accelerate import cpu_offload_with_hook
from diffusers import (
    FirstBlockCacheConfig,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPAGPipeline,
)
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from peft import LoraConfig
from tiny_conditioned import flux_kontext, picture
from tiny_images import sdxl
from tiny_pipelines import generators, sd3, sd15
from torch import nn
from transformers import CLIPConfig, CLIPImageProcessorPil

from diffusers_adjoint import memoryless_scheduler
from diffusers_adjoint.replay import PipelineReplay
from diffusers_adjoint.replay.conditioning import Numbering, place_of
from diffusers_adjoint.replay.stand_in import ReplayedTimesteps, ReplayStop

STEPS = 4
PROMPTS = ["a cat", "two dogs"]
SHORT = {"max_sequence_length": 8}  # SD3 pads its T5 text to 256 tokens otherwise
BUILDERS = pytest.mark.parametrize(("build", "kwargs"), [(sd3, SHORT), (sd15, {})], ids=["sd3", "sd15"])


def make_replay(pipeline, kwargs, guidance_scale=3.0, steps=STEPS):
    scheduler = memoryless_scheduler(pipeline.scheduler)
    return PipelineReplay(pipeline, scheduler, steps, guidance_scale=guidance_scale, pipeline_kwargs=kwargs)


def prepared(pipeline, kwargs, **settings):
    replay = make_replay(pipeline, kwargs, **settings)
    return replay, *replay.prepare({"prompt": PROMPTS}, generators())


def ordinary(pipeline, **kwargs):
    """(model_output, sample) of every step of the public call on the memoryless scheduler, and the images."""
    pipeline.scheduler = memoryless_scheduler(pipeline.scheduler)
    pipeline.scheduler.set_generator(generators())
    step, record = pipeline.scheduler.step, []

    def recording_step(model_output, timestep, sample, generator=None, return_dict=True):
        out = step(model_output, timestep, sample, generator=generator, return_dict=return_dict)
        record.append((model_output.clone(), sample.clone()))
        return out

    pipeline.scheduler.step = recording_step
    images = pipeline(PROMPTS, **{"num_inference_steps": STEPS, "generator": generators(), "output_type": "pt"} | kwargs).images
    return record, images


def count_calls(module):
    calls = []
    module.register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


def flux_transformer(**config):
    return FluxTransformer2DModel(num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=1, **config)


def denoiser(pipeline):
    return pipeline.components.get("transformer") or pipeline.unet


# --------------------------------------------------------------------------------------------------------- the same numbers


@BUILDERS
@pytest.mark.parametrize("guided", [True, False])
def test_predict_is_what_the_pipeline_hands_to_step(build, kwargs, guided):
    replay, x, conditioning = prepared(build(), kwargs)
    record, _ = ordinary(build(), guidance_scale=3.0 if guided else 1.0, **kwargs)
    assert torch.equal(x, record[0][1])
    for index, (model_output, sample) in enumerate(record):
        assert torch.equal(replay.predict(sample, index, conditioning, guided=guided), model_output)


def test_guidance_acts():
    replay, x, conditioning = prepared(sd15(), {})
    assert not torch.allclose(replay.predict(x, 0, conditioning), replay.predict(x, 0, conditioning, guided=False), rtol=1e-2)


def test_prompts_act():
    replay, x, conditioning = prepared(sd3(), SHORT)
    _, other = replay.prepare({"prompt": ["a fox", "the sea"]}, generators())
    # The random text encoders are nearly, but not quite, deaf: 1e-4 is far above rounding (1e-6).
    assert (replay.predict(x, 1, conditioning) - replay.predict(x, 1, other)).abs().max() > 1e-4


def test_guidance_that_depends_on_the_step_sees_the_true_index():
    skip = {"skip_guidance_layers": [0], "skip_layer_guidance_start": 0.2, "skip_layer_guidance_stop": 0.6, **SHORT}
    pipeline = sd3()
    replay, _, conditioning = prepared(pipeline, skip)
    record, _ = ordinary(sd3(), guidance_scale=3.0, **skip)
    calls = count_calls(pipeline.transformer)
    counts = []
    for index, (model_output, sample) in enumerate(record):
        calls.clear()
        assert torch.equal(replay.predict(sample, index, conditioning), model_output)
        counts.append(len(calls))
    assert counts == [1, 2, 2, 1]  # an extra call at the steps i with .2 K < i < .6 K


def test_dynamic_shift_comes_from_the_pipeline():
    host = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    replay, x, conditioning = prepared(sd3(host), {"height": 32, "width": 32, **SHORT})
    pipeline = sd3(host)
    record, _ = ordinary(pipeline, height=32, width=32, guidance_scale=3.0, **SHORT)
    assert x.shape[-1] == 16
    assert torch.equal(replay.scheduler.timesteps, pipeline.scheduler.timesteps)
    assert torch.equal(replay.predict(record[2][1], 2, conditioning), record[2][0])


def test_a_pipeline_that_scales_its_input_takes_a_scheduler_that_does_not():
    pipeline = sd15(FlowMatchEulerDiscreteScheduler())  # SD1.5's code reads init_noise_sigma, which this scheduler lacks
    replay, x, conditioning = prepared(pipeline, {})
    assert replay.predict(x, 1, conditioning).shape == x.shape


def test_half_precision_keeps_float32_states():
    pipeline = sd3().to(torch.bfloat16)
    replay, x, conditioning = prepared(pipeline, SHORT)
    assert x.dtype == torch.float32
    assert conditioning.start.dtype == torch.bfloat16
    leaf = (x + 1e-5).requires_grad_()
    output = replay.predict(leaf, 1, conditioning)
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, replay.predict(x, 1, conditioning))  # 1e-5 is lost when the pipeline rounds
    assert torch.autograd.grad(output.sum(), leaf)[0].dtype == torch.float32


# -------------------------------------------------------------------------------------------------------------- gradients


def central_difference(function, at, direction, size):
    with torch.no_grad():
        return ((function(at + size * direction) - function(at - size * direction)) / (2 * size)).item()


@BUILDERS
def test_derivative_in_the_state(build, kwargs):
    replay, x, conditioning = prepared(build().to(torch.float64), kwargs)
    weights, direction = torch.randn_like(x), torch.randn_like(x)

    def scalar(state):
        return (replay.predict(state, 2, conditioning) * weights).sum()

    leaf = x.clone().requires_grad_()
    derivative = (torch.autograd.grad(scalar(leaf), leaf)[0] * direction).sum().item()
    # Central differences: truncation ~ size² = 1e-10, rounding ~ 1e-16 / size = 1e-11, of order-one values.
    assert derivative == pytest.approx(central_difference(scalar, x, direction, 1e-5), rel=1e-7)


@BUILDERS
def test_derivative_in_the_lora_weights(build, kwargs):
    pipeline = build()
    network = denoiser(pipeline).requires_grad_(False)
    network.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False))
    pipeline.to(torch.float64)
    replay, x, conditioning = prepared(pipeline, kwargs)
    trained = [weight for weight in network.parameters() if weight.requires_grad]
    directions = [torch.randn_like(weight) for weight in trained]
    weights = torch.randn_like(x)
    gradients = torch.autograd.grad((replay.predict(x, 2, conditioning) * weights).sum(), trained, allow_unused=True)
    derivative = sum((g * d).sum().item() for g, d in zip(gradients, directions, strict=True) if g is not None)

    def scalar(size):
        with torch.no_grad():
            for weight, direction in zip(trained, directions, strict=True):
                weight.add_(size * direction)
            value = (replay.predict(x, 2, conditioning) * weights).sum()
            for weight, direction in zip(trained, directions, strict=True):
                weight.sub_(size * direction)
        return value

    expected = central_difference(scalar, torch.zeros(()), torch.ones(()), 1e-5)
    assert abs(expected) > 1e-4  # the adapter acts at all
    assert derivative == pytest.approx(expected, rel=1e-6)  # as above; the value itself is smaller


# ----------------------------------------------------------------------------------------------------------------- decode


@BUILDERS
def test_decode_is_the_pipelines_own(build, kwargs):
    replay, _, conditioning = prepared(build(), kwargs)
    _, latents = ordinary(build(), guidance_scale=3.0, output_type="latent", **kwargs)
    _, images = ordinary(build(), guidance_scale=3.0, **kwargs)
    assert images.shape == (2, 3, 16, 16)
    assert 0 <= images.min() < images.max() <= 1
    assert torch.equal(replay.decode(latents, conditioning), images)


@BUILDERS
def test_derivative_of_decode(build, kwargs):
    replay, x, conditioning = prepared(build().to(torch.float64), kwargs)
    x, direction = 0.1 * x, torch.randn_like(x)  # small latents: few saturated pixels
    weights = torch.randn_like(replay.decode(x, conditioning))

    def scalar(state):
        return (replay.decode(state, conditioning) * weights).sum()

    leaf = x.clone().requires_grad_()
    derivative = (torch.autograd.grad(scalar(leaf), leaf)[0] * direction).sum().item()
    assert abs(derivative) > 1e-3
    # As above; a pixel at the clamp may cross it within the difference, which moves the value by its size.
    assert derivative == pytest.approx(central_difference(scalar, x, direction, 1e-6), rel=1e-5)


def test_a_safety_checker_does_not_stop_the_gradient():
    config = CLIPConfig(
        vision_config={"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    )
    pipeline = sd15()
    pipeline.register_modules(
        safety_checker=StableDiffusionSafetyChecker(config).eval(), feature_extractor=CLIPImageProcessorPil()
    )
    replay, x, conditioning = prepared(pipeline, {})
    assert torch.autograd.grad(replay.decode(x.requires_grad_(), conditioning).sum(), x)[0].abs().max() > 0
    assert pipeline.safety_checker is not None


# ----------------------------------------------------------------------------------------------------- what is evaluated


@BUILDERS
def test_nothing_is_evaluated_twice(build, kwargs):
    pipeline = build()
    network_calls = count_calls(denoiser(pipeline))
    text_calls = count_calls(pipeline.text_encoder)
    decoder_calls = count_calls(pipeline.vae.decoder)
    replay, x, conditioning = prepared(pipeline, kwargs)
    # The prompts, which guided and unguided calls share, and "" for guidance.
    assert (len(network_calls), len(text_calls), len(decoder_calls)) == (0, 2, 0)
    replay.predict(x, 0, conditioning)
    replay.predict(x, STEPS - 1, conditioning, guided=False)
    assert (len(network_calls), len(text_calls), len(decoder_calls)) == (2, 2, 0)
    replay.decode(x, conditioning)
    assert (len(network_calls), len(text_calls), len(decoder_calls)) == (2, 2, 1)


def test_condition_images_are_resized_and_encoded_once(monkeypatch):
    pipeline = flux_kontext()
    encodings = count_calls(pipeline.vae.encoder)
    resizings, resize = [], VaeImageProcessor.resize
    monkeypatch.setattr(VaeImageProcessor, "resize", lambda *args, **kwargs: resizings.append(1) or resize(*args, **kwargs))
    size = {"height": 16, "width": 16, "max_area": 256, "_auto_resize": False, "max_sequence_length": 16}
    replay = make_replay(pipeline, size, guidance_scale=3.5)
    x, conditioning = replay.prepare({"prompt": PROMPTS, "image": [picture(1), picture(2)]}, generators())
    assert encodings
    assert resizings
    encodings.clear(), resizings.clear()
    replay.predict(x, 1, conditioning)
    replay.decode(x, conditioning)
    assert not encodings
    assert not resizings
    assert not {"resize", "preprocess"} & vars(pipeline.image_processor).keys()


@pytest.mark.parametrize(
    ("guidance_scale", "modes", "encodings"),
    [(3.0, {}, 2), (3.0, {"unguided": False}, 2), (3.0, {"guided": False}, 1), (1.0, {}, 1)],
    ids=["both", "guided only", "unguided only", "no guidance"],
)
def test_prompts_are_encoded_as_often_as_needed(guidance_scale, modes, encodings):
    pipeline = sd15()
    calls = count_calls(pipeline.text_encoder)
    make_replay(pipeline, {}, guidance_scale=guidance_scale).prepare({"prompt": PROMPTS}, generators(), **modes)
    assert len(calls) == encodings


def test_a_mode_that_was_not_prepared_is_refused():
    replay = make_replay(sd15(), {})
    x, conditioning = replay.prepare({"prompt": PROMPTS}, generators(), unguided=False)
    with pytest.raises(ValueError, match="prepared without guided=False"):
        replay.predict(x, 0, conditioning, guided=False)


def test_both_modes_start_from_the_same_noise():
    replay = make_replay(sd15(), {})
    x, _ = replay.prepare({"prompt": PROMPTS}, generators(), unguided=False)
    y, both = replay.prepare({"prompt": PROMPTS}, generators())
    _, _ = replay.prepare({"prompt": PROMPTS}, generators(), guided=False)
    assert torch.equal(x, y)
    assert torch.equal(*(both.recordings[mode].returns["prepare_latents"][0].value for mode in (True, False)))


@BUILDERS
def test_unguided_evaluates_the_batch_once(build, kwargs):
    pipeline = build()
    replay, x, conditioning = prepared(pipeline, kwargs)
    rows = []
    denoiser(pipeline).register_forward_hook(lambda module, args, output: rows.append(len(output[0])))
    replay.predict(x, 1, conditioning)
    replay.predict(x, 1, conditioning, guided=False)
    assert rows == [4, 2]


def test_the_graph_is_freed_with_the_output():
    replay, x, conditioning = prepared(sd3(), SHORT)
    gc.disable()  # so that a reference cycle (through the exception that ends the call) would keep it
    try:
        output = replay.predict(x.requires_grad_(), 1, conditioning)
        alive = weakref.ref(output)
        del output
        assert alive() is None
    finally:
        gc.enable()


# ------------------------------------------------------------------------------------------------------------ the batch


@BUILDERS
def test_a_row_depends_on_its_own_generator_and_prompt_only(build, kwargs):
    replay = make_replay(build(), kwargs)
    x, conditioning = replay.prepare({"prompt": PROMPTS}, generators((1, 2)))
    alone, alone_conditioning = replay.prepare({"prompt": PROMPTS[1:]}, generators((2,)))
    assert torch.equal(x[1:], alone)
    together = replay.predict(x, 1, conditioning)[1:]
    # The same sums, split differently over the batch: float32 rounding.
    torch.testing.assert_close(together, replay.predict(alone, 1, alone_conditioning), rtol=1e-5, atol=1e-5)


def test_columns_reach_the_call_and_others_do_not():
    pipeline = sd15()
    replay = make_replay(pipeline, {})
    columns = {"prompt": PROMPTS, "negative_prompt": ["blurry", "dark"], "label": [3, 4]}
    x, conditioning = replay.prepare(columns, generators())
    record, _ = ordinary(sd15(), guidance_scale=3.0, negative_prompt=columns["negative_prompt"])
    assert torch.equal(replay.predict(x, 0, conditioning), record[0][0])
    plain, _ = ordinary(sd15(), guidance_scale=3.0)
    assert not torch.equal(plain[0][0], record[0][0])


def encoding(conditioning):
    return conditioning.recordings[True].returns["encode_prompt"][0].value[0]


def test_pipeline_kwargs_reach_every_call():
    _, _, short = prepared(sd3(), {"max_sequence_length": 8})
    _, _, long = prepared(sd3(), {"max_sequence_length": 12})
    assert encoding(long).shape[1] - encoding(short).shape[1] == 4


# ------------------------------------------------------------------------------------------------- another denoiser


@BUILDERS
def test_a_frozen_copy_runs_in_place_of_the_denoiser(build, kwargs):
    pipeline = build()
    replay, x, conditioning = prepared(pipeline, kwargs)
    before = replay.predict(x, 1, conditioning)
    frozen = copy.deepcopy(denoiser(pipeline))
    with torch.no_grad():
        for weight in denoiser(pipeline).parameters():
            weight.mul_(1.1)
    assert torch.equal(replay.predict(x, 1, conditioning, denoiser=frozen), before)
    assert not torch.equal(replay.predict(x, 1, conditioning), before)


class Wrapper(nn.Module):
    """Like DistributedDataParallel: calls what it wraps and shows none of its attributes."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


@BUILDERS
def test_a_wrapped_denoiser_is_called_through_its_wrapper(build, kwargs):
    pipeline = build()
    replay, x, conditioning = prepared(pipeline, kwargs)
    wrapper = Wrapper(denoiser(pipeline))
    outer, inner = count_calls(wrapper), count_calls(denoiser(pipeline))
    assert torch.equal(replay.predict(x, 1, conditioning, denoiser=wrapper), replay.predict(x, 1, conditioning))
    assert (len(outer), len(inner)) == (1, 2)


# -------------------------------------------------------------------------------------------------- nothing left behind


def snapshot(pipeline):
    network = denoiser(pipeline)
    return {
        "attributes": {name: id(value) for name, value in vars(pipeline).items()},
        "class": type(pipeline),
        "config": dict(pipeline.config),
        "scheduler": {name: str(value) for name, value in vars(pipeline.scheduler).items()},
        "processors": {name: id(value) for name, value in network.attn_processors.items()},
        "hooks": sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in network.modules()),
        "network": {name: id(value) for name, value in vars(network).items()},
    }


@BUILDERS
def test_the_users_pipeline_stays_as_it_was(build, kwargs):
    pipeline = build()
    before = snapshot(pipeline)
    replay, x, conditioning = prepared(pipeline, kwargs)
    replay.predict(x, 1, conditioning)
    replay.predict(x, 1, conditioning, denoiser=Wrapper(denoiser(pipeline)))
    replay.decode(x, conditioning)
    replay.sample({"prompt": PROMPTS}, generators())
    with pytest.raises(ValueError, match="x has shape"):
        replay.predict(x[:1], 1, conditioning)
    assert snapshot(pipeline) == before


def test_exchanged_attention_processors_are_put_back():
    pipeline = StableDiffusionPAGPipeline(**sd15().components, requires_safety_checker=False, pag_applied_layers=["up"])
    before = snapshot(pipeline)
    replay, x, conditioning = prepared(pipeline, {"pag_scale": 3.0})
    with_pag = replay.predict(x, 1, conditioning)
    assert snapshot(pipeline) == before
    # A copy gets the exchanged processors itself, so that it predicts the same.
    assert torch.equal(replay.predict(x, 1, conditioning, denoiser=copy.deepcopy(pipeline.unet)), with_pag)
    _, _, without = prepared(pipeline, {"pag_scale": 0.0})
    assert not torch.equal(with_pag, replay.predict(x, 1, without))


class RewritesItsPrompts(StableDiffusion3Pipeline):
    def check_inputs(self, prompt, *args, **kwargs):
        prompt[0] += "!"


def test_lists_given_to_the_pipeline_are_copies():
    pipeline = RewritesItsPrompts(**sd3().components)
    prompts = list(PROMPTS)
    replay = make_replay(pipeline, SHORT)
    x, conditioning = replay.prepare({"prompt": prompts}, generators())
    replay.predict(x, 0, conditioning)
    assert prompts == PROMPTS == conditioning.recordings[True].call_kwargs["prompt"]


@BUILDERS
def test_sample_is_the_public_call(build, kwargs):
    replay = make_replay(build(), kwargs)
    images = replay.sample({"prompt": PROMPTS}, generators())
    expected = build()(
        PROMPTS, num_inference_steps=STEPS, generator=generators(), output_type="pt", guidance_scale=3.0, **kwargs
    ).images
    assert torch.equal(images, expected)


# ------------------------------------------------------------------------------------------------------ controlled loops


def test_timesteps_look_whole_but_visit_what_is_asked():
    grid = torch.tensor([900, 600, 300, 100])
    steps = ReplayedTimesteps.of(grid, (-2,))
    assert len(steps) == 4
    assert steps[1] == 600
    assert type(steps[1]) is torch.Tensor
    assert type(steps / 1000) is torch.Tensor
    assert list(steps) == [300]
    assert steps[1:].visited() == [(1, 300)]  # counted from the end: a cut-off beginning moves the index only
    assert steps.to(torch.float64).visited() == [(2, 300.0)]
    assert list(ReplayedTimesteps.of(grid, ())) == []
    with pytest.raises(ReplayStop):
        iter(ReplayedTimesteps.of(grid, None))
    with pytest.raises(ValueError, match="loops over 1 steps of its grid only.*; leave out denoising_end"):
        list(steps[3:])


class Loop(StableDiffusion3Pipeline):
    """A pipeline with a loop of its own: without enumerate, without prompts."""

    def __call__(self, num_inference_steps=4, generator=None, output_type="pt", return_dict=True):
        latents = self.prepare_latents(2, 4, 8, 8, torch.float32, "cpu", generator)
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.timesteps():
            latents = self.scheduler.step(t * latents, t, latents, return_dict=False)[0]
        return (latents,)

    def timesteps(self):
        return self.scheduler.timesteps


class LoopOverNumbers(Loop):
    def timesteps(self):
        return self.scheduler.timesteps.tolist()


def test_a_loop_without_enumerate():
    replay = make_replay(Loop(**sd3().components), {}, guidance_scale=1.0)
    x, conditioning = replay.prepare({}, generators())
    for index in range(STEPS):
        assert torch.equal(replay.predict(x, index, conditioning), replay.scheduler.timesteps[index] * x)
    assert torch.equal(replay.decode(x, conditioning), x)


def test_a_loop_out_of_reach_is_refused():
    replay = make_replay(LoopOverNumbers(**sd3().components), {}, guidance_scale=1.0)
    with pytest.raises(ValueError, match="LoopOverNumbers does not loop over scheduler.timesteps"):
        replay.prepare({}, generators())


class KeepsSteps(Loop):
    """Loops over a part of its grid."""

    kept = slice(None)

    def timesteps(self):
        return self.scheduler.timesteps[self.kept]


def test_a_grid_cut_at_its_start():
    class StartsBelowNoise(KeepsSteps):
        kept = slice(1, None)

    replay = make_replay(StartsBelowNoise(**sd3().components), {}, guidance_scale=1.0)
    x, conditioning = replay.prepare({}, generators())
    assert replay.starts_below_noise
    assert torch.equal(replay.timesteps, replay.scheduler.timesteps[1:])
    for name in ("stds", "posterior_stds", "gains", "times"):
        assert torch.equal(getattr(replay, name), getattr(replay.scheduler, name)[1:]), name
    output = replay.predict(x, 0, conditioning)
    assert torch.equal(output, replay.scheduler.timesteps[1] * x)
    assert torch.equal(replay.transition(output, x, 0).mean, replay.scheduler.transition(output, x, 1).mean)
    assert torch.equal(replay.decode(x, conditioning), x)
    with pytest.raises(ValueError, match="pass 0 to 2"):
        replay.predict(x, 3, conditioning)


def test_a_grid_cut_at_its_end_is_refused():
    class StopsBeforeData(KeepsSteps):
        kept = slice(None, -1)

    replay = make_replay(StopsBeforeData(**sd3().components), {}, guidance_scale=1.0)
    with pytest.raises(ValueError, match="StopsBeforeData stops its loop before the last step"):
        replay.prepare({}, generators())


def test_sdxls_denoising_end_is_refused():
    """It filters its timesteps before its loop."""
    replay = make_replay(sdxl(), {"denoising_end": 0.5})
    with pytest.raises(ValueError, match="StableDiffusionXLPipeline stops its loop before the last step"):
        replay.prepare({"prompt": PROMPTS}, generators())


class GuidedByAnotherScale(Loop):
    @property
    def do_classifier_free_guidance(self):
        return self._audio_guidance_scale > 1


def test_guidance_that_depends_on_more_than_the_guidance_scale():
    make_replay(GuidedByAnotherScale(**sd3().components), {}, guidance_scale=1.0).prepare({}, generators())


class ConditionBesideState(Loop):
    """Two condition channels in the same tensor as the state, which is a view into it."""

    def __call__(self, batch_size=1, num_inference_steps=4, generator=None, output_type="pt", return_dict=True):
        latents = self.prepare_latents(batch_size, 6, 8, 8, torch.float32, "cpu", generator)
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            output = latents[:, 1:5] * latents[:, 5:]
            latents[:, 1:5] = self.scheduler.step(output, t, latents[:, 1:5], return_dict=False)[0]
        return (latents[:, 1:5],)


@pytest.mark.parametrize("seeds", [(1,), (1, 2), (1, 2, 3)])
def test_a_state_inside_larger_latents(seeds):
    """It is found once, with the samples of the check at the start, and holds for any number."""
    replay = make_replay(ConditionBesideState(**sd3().components), {}, guidance_scale=1.0)
    replay.find_state({}, generators((1, 2)))
    x, conditioning = replay.prepare({}, generators(seeds))
    assert len(x) == len(seeds)
    whole = conditioning.recordings[True].returns["prepare_latents"][0].value
    assert torch.equal(x, whole[:, 1:5])
    y = torch.randn_like(x).requires_grad_()
    output = replay.predict(y, 1, conditioning)
    assert torch.equal(output, y * whole[:, 5:])
    assert torch.equal(torch.autograd.grad(output.sum(), y)[0], whole[:, 5:].expand_as(y))
    assert torch.equal(replay.decode(y, conditioning), y)
    assert torch.equal(x, whole[:, 1:5])  # the recording is as it was


def packed(latents):
    return latents.unflatten(2, (-1, 2)).permute(0, 2, 1, 3, 4).flatten(2)


SELECTIONS = {
    "channels": lambda latents: latents[:, 1:4],
    "channels and columns": lambda latents: latents[:, 2:5, :, 0:2],
    "every other": lambda latents: latents[:, ::2],
    "a copy": lambda latents: latents[:, 1:].clone(),
    "packed, then cut": lambda latents: packed(latents)[:, 1:],
    "another order": lambda latents: latents.permute(0, 3, 1, 2),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("select", SELECTIONS.values(), ids=SELECTIONS.keys())
def test_where_a_part_lies(select, dtype):
    latents = torch.randn(2, 5, 40, 3, dtype=dtype)  # 600 elements, which one digit does not number
    digits = [select(Numbering(d).recording("", lambda: latents)()) for d in Numbering.digits_of(latents)]
    assert len(digits) == 2
    place = place_of(select(latents), latents, digits)
    assert torch.equal(latents.flatten(1)[:, place], select(latents))


def test_what_is_no_selection_has_no_place():
    latents = torch.randn(2, 4, 3)
    for function in (
        lambda x: 2 * x,
        lambda x: x.flip(0),
        lambda x: x[:, :2].repeat(1, 2, 1),
        lambda x: x + 1,
        lambda x: x.cumsum(1),
    ):
        digits = [function(Numbering(0).recording("", lambda: latents)())]
        assert place_of(function(latents), latents, digits) is None


def test_latents_are_numbered_once():
    numbered = Numbering(0).recording("prepare_latents", lambda: (torch.zeros(1, 3), "mask"))
    assert torch.equal(numbered()[0], torch.tensor([[0.0, 1.0, 2.0]])) and torch.equal(numbered()[0], torch.zeros(1, 3))


class DecodesWithNoise(Loop):
    def __call__(self, num_inference_steps=4, generator=None, output_type="pt", return_dict=True):
        (latents,) = super().__call__(num_inference_steps, generator, output_type, return_dict)
        return (latents + torch.stack([torch.randn(latents.shape[1:], generator=g) for g in generator]),)


def test_a_decoder_that_draws_noise_draws_the_same_each_time():
    replay = make_replay(DecodesWithNoise(**sd3().components), {}, guidance_scale=1.0)
    x, conditioning = replay.prepare({}, generators())
    images = replay.decode(x, conditioning)
    assert torch.equal(replay.decode(x, conditioning), images)
    drawn = generators()
    for generator in drawn:
        torch.randn(x.shape[1:], generator=generator)  # x_0 came first
    assert torch.equal(images, x + torch.stack([torch.randn(x.shape[1:], generator=g) for g in drawn]))


class TwoScales(Loop):
    """m = guidance_scale · true_cfg_scale · x."""

    def __call__(
        self, guidance_scale=7.0, true_cfg_scale=4.0, num_inference_steps=4, generator=None, output_type="pt", return_dict=True
    ):
        latents = self.prepare_latents(2, 4, 8, 8, torch.float32, "cpu", generator)
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            output = guidance_scale * true_cfg_scale * latents
            latents = self.scheduler.step(output, t, latents, return_dict=False)[0]
        return (latents,)


@pytest.mark.parametrize(
    ("embedded", "kwargs", "guided", "unguided"),
    [(True, {"true_cfg_scale": 2.0}, 3.0 * 2.0, 3.0), (False, {}, 7.0 * 3.0, 7.0)],
    ids=["the option is the embedding", "the option is true CFG"],
)
def test_a_distilled_guidance_embedding_is_not_guidance(embedded, kwargs, guided, unguided):
    pipeline = TwoScales(**sd3().components)
    pipeline.register_modules(transformer=flux_transformer(guidance_embeds=embedded))
    replay = make_replay(pipeline, kwargs)
    x, conditioning = replay.prepare({}, generators())
    assert torch.equal(replay.predict(x, 0, conditioning), guided * x)
    assert torch.equal(replay.predict(x, 0, conditioning, guided=False), unguided * x)


# ------------------------------------------------------------------------------------------------------------- bad input


def offloaded():
    pipeline = sd3()
    cpu_offload_with_hook(pipeline.transformer, execution_device="cpu")
    return pipeline


def group_offloaded():
    pipeline = sd3()
    pipeline.transformer.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
    return pipeline


def cached():
    pipeline = sd3()
    transformer = flux_transformer()
    transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    pipeline.register_modules(transformer=transformer)
    return pipeline


def without(name):
    pipeline = sd3()
    setattr(pipeline, name, None)
    return pipeline


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (lambda: nn.Linear(1, 1), {}, "the pipeline is a Linear; pass a diffusers DiffusionPipeline"),
        (lambda: without("scheduler"), {}, "StableDiffusion3Pipeline has no scheduler"),
        (lambda: without("transformer"), {}, "StableDiffusion3Pipeline has no transformer and no unet"),
        (cached, {}, "reuses cached outputs"),
        (offloaded, {}, "offloaded to the CPU"),
        (group_offloaded, {}, "offloaded to the CPU"),
        (lambda: Loop(**sd3().components), {"guidance_scale": 5.0}, "Loop takes no guidance_scale, but 5.0"),
        (sd3, {"pipeline_kwargs": {"hieght": 64}}, "'hieght', which StableDiffusion3Pipeline does not take"),
        (sd3, {"pipeline_kwargs": {"guidance_scale": 5.0}}, "'guidance_scale', which is not set there"),
        (sd3, {"pipeline_kwargs": {"prompt": "a cat"}}, "'prompt'; pass prompts as"),
    ],
)
def test_what_cannot_be_replayed_is_refused(make, settings, message):
    with pytest.raises((ValueError, TypeError), match=message) as error:
        PipelineReplay(make(), FlowMatchEulerDiscreteScheduler(), STEPS, **settings)
    assert str(error.value).count("\n") == 0


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"text": PROMPTS}, r"needs prompts, but the columns are \['text'\]"),
        ({"prompt": PROMPTS, "negative_prompt": ["x"]}, "'negative_prompt' has 1 values for 2 generators"),
        ({"prompt": PROMPTS, "latents": [0, 0]}, "column 'latents' would set"),
    ],
)
def test_columns_that_do_not_fit_are_refused(columns, message):
    with pytest.raises(ValueError, match=message):
        make_replay(sd3(), SHORT).prepare(columns, generators())


def test_an_index_off_the_grid_is_refused():
    replay, x, conditioning = prepared(sd3(), SHORT)
    for index in (-1, STEPS):
        with pytest.raises(ValueError, match=f"index={index} is not on the grid; pass 0 to 3"):
            replay.predict(x, index, conditioning)


def test_an_ordinary_sample_leaves_the_noise_source_of_the_users_scheduler_where_it_is():
    """So that an evaluation during training draws the same as the one before; SD3 passes its scheduler no generator."""
    pipeline = sd3()
    pipeline.scheduler = memoryless_scheduler(pipeline.scheduler)
    pipeline.scheduler.set_generator(generators())
    replay = PipelineReplay(pipeline, memoryless_scheduler(pipeline.scheduler), STEPS)
    first, again = (replay.sample({"prompt": PROMPTS}, generators()) for _ in range(2))
    assert torch.equal(first, again)
    (untouched, *_), (mine, *_) = generators(), pipeline.scheduler.generator
    assert torch.equal(mine.get_state(), untouched.get_state())
