"""Pipelines that cast their VAE up to decode, in float16: the right images, the right gradient, and the user's VAE untouched."""

import copy
import logging
import types

import pytest
import torch
from datasets import Dataset
from diffusers import StableDiffusionXLPAGPipeline
from peft import LoraConfig
from tiny_conditioned import components_of, picture, sdxl_controlnet, sdxl_from_image, stable_video
from tiny_images import aura_flow, kolors, sdxl
from tiny_pipelines import eval_mode, generators
from tiny_trainer import brightness, config, make_trainer

from diffusers_adjoint import AdjointMatchingTrainer, memoryless_scheduler
from diffusers_adjoint.replay import PipelineReplay, check_replay
from diffusers_adjoint.replay.casting import castable
from diffusers_adjoint.rewards import WeightedReward, reward_gradient

PROMPTS = ["a cat", "two dogs"]
IMAGES = [picture(1), picture(2)]
SMALL = {"height": 16, "width": 16}


def sdxl_pag():
    return eval_mode(StableDiffusionXLPAGPipeline(**components_of(sdxl()), add_watermarker=False))


# All with `force_upcast`, the default, as published.
CASTING = {
    "SDXL": (sdxl, {}, {}),
    "SDXL, image to image": (sdxl_from_image, {"image": IMAGES}, {}),
    "SDXL ControlNet": (sdxl_controlnet, {"image": IMAGES}, {}),
    "SDXL PAG": (sdxl_pag, {}, {"pag_scale": 0.0}),
    "Kolors": (kolors, {}, SMALL | {"max_sequence_length": 32}),
    "AuraFlow": (aura_flow, {}, SMALL | {"max_sequence_length": 16}),
}
PIPELINES = pytest.mark.parametrize(("build", "columns", "kwargs"), CASTING.values(), ids=CASTING)


def prepared(pipeline, columns, kwargs):
    """The replay, the last latents of its memoryless scheduler and the images of the plain call that ended in them."""
    replay = PipelineReplay(pipeline, memoryless_scheduler(pipeline.scheduler), 4, guidance_scale=3.0, pipeline_kwargs=kwargs)
    _, conditioning = replay.prepare({"prompt": PROMPTS, **columns}, generators())
    plain = copy.deepcopy(pipeline)
    plain.scheduler = memoryless_scheduler(plain.scheduler)
    plain.scheduler.set_generator(generators())
    own_step, ends = plain.scheduler.step, []

    def step(*args, **options):
        out = own_step(*args, **options)
        ends[:] = [(out[0] if isinstance(out, tuple) else out.prev_sample).clone()]
        return out

    plain.scheduler.step = step
    call = {"num_inference_steps": 4, "guidance_scale": 3.0, "generator": generators(), "output_type": "pt"}
    images = plain(PROMPTS, **columns, **kwargs, **call).images
    return replay, ends[0], conditioning, images


def values_of(vae):
    return {name: value.clone() for name, value in vae.state_dict().items()}


def unchanged(vae, before):
    after = vae.state_dict()
    return before.keys() == after.keys() and all(
        value.dtype == after[name].dtype and torch.equal(value, after[name]) for name, value in before.items()
    )


def left(images, prompts):
    """A reward that is not the same for all pixels."""
    weight = torch.linspace(1, 0, images.shape[-1]).to(images)
    return (images * weight).mean((1, 2, 3))


def reference(pipeline, latents):
    """∇ left(decode(latents)), by a copy of the VAE that is in float32 all along."""
    vae = copy.deepcopy(pipeline.vae).float().requires_grad_(False)
    leaf = latents.float().requires_grad_()
    images = (vae.decode(leaf / vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
    return torch.autograd.grad(left(images, PROMPTS).sum(), leaf)[0]


@PIPELINES
def test_decoding_in_float16(build, columns, kwargs):
    pipeline = build().to(torch.float16)
    before = values_of(pipeline.vae)
    replay, latents, conditioning, images = prepared(pipeline, columns, kwargs)
    with torch.no_grad():
        assert torch.equal(replay.decode(latents, conditioning), images)
    found = reward_gradient(latents.float(), lambda x: replay.decode(x, conditioning), WeightedReward(left), PROMPTS, {})
    expected = reference(pipeline, latents)
    assert expected.abs().max() > 1e-5
    # The latents are rounded to float16, and with them the gradient: half a unit of 11 bits, of each value.
    torch.testing.assert_close(found.gradient, expected, rtol=1e-3, atol=1e-6 * expected.abs().max().item())
    assert unchanged(pipeline.vae, before)


@pytest.mark.parametrize("memory", ["enable_gradient_checkpointing", "enable_slicing", "enable_tiling"])
def test_a_decoder_that_saves_memory(memory):
    """Checkpointed layers are evaluated again in the backward pass, long after the pipeline has cast its VAE back."""
    pipeline = sdxl().to(torch.float16)
    getattr(pipeline.vae, memory)()
    replay, latents, conditioning, images = prepared(pipeline, {}, {})
    with torch.no_grad():
        assert torch.equal(replay.decode(latents, conditioning), images)
    found = reward_gradient(latents.float(), lambda x: replay.decode(x, conditioning), WeightedReward(left), PROMPTS, {})
    expected = reference(pipeline, latents)
    torch.testing.assert_close(found.gradient, expected, rtol=1e-3, atol=1e-6 * expected.abs().max().item())


def test_a_decoder_with_a_method_of_the_users():
    """A method put on the VAE is bound to it; in a call it must run with the weights of that call."""
    pipeline = sdxl().to(torch.float16)
    replay, latents, conditioning, images = prepared(pipeline, {}, {})
    pipeline.vae.decode = types.MethodType(lambda vae, z, **options: type(vae).decode(vae, z, **options), pipeline.vae)
    leaf = latents.float().requires_grad_()
    decoded = replay.decode(leaf, conditioning)
    assert torch.equal(decoded, images)
    assert torch.autograd.grad(decoded.sum(), leaf)[0].any()


def test_a_vae_that_preparing_the_latents_casts_down():
    """Image to image leaves the VAE in the dtype of the prompts, rounded; decoding then starts from there."""
    pipeline = sdxl_from_image().to(torch.float16)
    pipeline.vae.float()
    before = values_of(pipeline.vae)
    replay, latents, conditioning, images = prepared(pipeline, {"image": IMAGES}, {})
    with torch.no_grad():
        assert torch.equal(replay.decode(latents, conditioning), images)
    assert unchanged(pipeline.vae, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("build", "columns", "kwargs"),
    [
        pytest.param(*CASTING[name], id=name, marks=() if name in ("SDXL", "AuraFlow") else pytest.mark.slow)
        for name in CASTING
        if name != "SDXL PAG"  # evaluates two rows a sample whatever the guidance, and is refused for it
    ],
)
def test_the_check_at_the_start_passes(build, columns, kwargs, dtype):
    pipeline = build().to(dtype)
    before = values_of(pipeline.vae)
    scheduler = memoryless_scheduler(pipeline.scheduler)
    replay = PipelineReplay(pipeline, scheduler, 4, guidance_scale=3.0, pipeline_kwargs=kwargs)
    check_replay(replay, {"prompt": PROMPTS, **columns}, generators())
    assert unchanged(pipeline.vae, before)


@pytest.mark.slow
def test_a_video_pipeline_that_encodes_its_image_in_float32():
    """Stable Video Diffusion casts its VAE up to encode, and back, within the call itself."""
    pipeline = stable_video().to(torch.float16)
    before = values_of(pipeline.vae)
    scheduler = memoryless_scheduler(pipeline.scheduler)
    kwargs = {**SMALL, "num_frames": 2, "decode_chunk_size": 2}
    replay = PipelineReplay(pipeline, scheduler, 4, guidance_scale=3.0, pipeline_kwargs=kwargs)
    check_replay(replay, {"image": IMAGES}, generators())
    assert unchanged(pipeline.vae, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_training_and_evaluation(tmp_path, dtype):
    pipeline = sdxl().to(dtype)
    before = values_of(pipeline.vae)
    dataset = Dataset.from_dict({"prompt": PROMPTS})
    trainer = make_trainer(tmp_path, pipeline=pipeline, eval_dataset=dataset)
    trainer.train()
    assert trainer.state.global_step == 2
    assert all(record["skipped"] == 0 for record in trainer.state.log_history if "loss" in record)
    assert any(p.any() for name, p in trainer.denoiser.network.named_parameters() if "lora_B" in name)
    assert 0 < trainer.evaluate()["eval_reward"] < 1
    assert unchanged(pipeline.vae, before)


def test_a_cast_tells_nothing_false(caplog):
    """Of modules to be kept in float32, of which this VAE has none; a list that is not empty is told as before."""
    vae, logger = sdxl().vae, logging.getLogger("diffusers.models.modeling_utils")
    logger.addHandler(caplog.handler)
    try:
        with caplog.at_level(logging.WARNING, logger.name):
            castable(vae).to(dtype=torch.float16)
            assert "should be kept in float32" not in caplog.text
            vae._keep_in_fp32_modules = ["decoder"]
            castable(vae).to(dtype=torch.float16)
    finally:
        logger.removeHandler(caplog.handler)
    assert "should be kept in float32: ['decoder']" in caplog.text


def test_training_stopped_by_an_error(tmp_path):
    pipeline = sdxl().to(torch.float16)
    before = values_of(pipeline.vae)
    calls = []

    def breaks(images, prompts):
        calls.append(1)
        if len(calls) > 1:
            raise KeyError("a reward of the user's")
        return brightness(images, prompts)

    with pytest.raises(RuntimeError, match="reward 'breaks'") as caught:
        make_trainer(tmp_path, pipeline=pipeline, reward=breaks).train()
    assert isinstance(caught.value.__cause__, KeyError)
    assert len(calls) == 2
    assert unchanged(pipeline.vae, before)


def test_image_to_image_trains(tmp_path):
    pipeline = sdxl_from_image().to(torch.float16)
    before = values_of(pipeline.vae)
    rows = [{"prompt": prompt, "image": image} for prompt, image in zip(PROMPTS, IMAGES, strict=True)]
    settings = config(tmp_path, num_loss_steps=1)
    trainer = AdjointMatchingTrainer(pipeline, brightness, settings, rows, peft_config=LoraConfig(r=2))
    trainer.train()
    assert any(p.any() for name, p in trainer.denoiser.network.named_parameters() if "lora_B" in name)
    assert unchanged(pipeline.vae, before)
