"""The start-up check: silent on pipelines that keep the conventions, and one sentence for each that does not."""

import pytest
import torch
from diffusers import (
    AutoencoderKLWan,
    Cosmos2TextToImagePipeline,
    CosmosTransformer3DModel,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusion3Pipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
)
from PIL import Image
from test_replay import BUILDERS, PROMPTS, SHORT, STEPS, count_calls, denoiser, make_replay, snapshot
from tiny_conditioned import picture, wan22_from_image
from tiny_images import chroma, flux, flux2_klein, sdxl
from tiny_parts import t5
from tiny_pipelines import generators, sd3, sd15
from tiny_videos import wan22

from diffusers_adjoint import memoryless_scheduler
from diffusers_adjoint.replay import PipelineReplay, check_replay


def check(pipeline, kwargs=SHORT, *, guidance_scale=3.0, **settings):
    replay = make_replay(pipeline, kwargs, guidance_scale=guidance_scale)
    check_replay(replay, {"prompt": PROMPTS}, generators(), **settings)


@BUILDERS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_sound_pipelines_pass(build, kwargs, dtype, guidance_scale):
    pipeline = build().to(dtype)
    calls = count_calls(denoiser(pipeline))
    before = snapshot(pipeline)
    check(pipeline, kwargs, guidance_scale=guidance_scale)
    assert len(calls) <= 32
    assert snapshot(pipeline) == before


def test_a_network_stored_in_eight_bits_passes():
    pipeline = sd3()
    pipeline.transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    check(pipeline)


class RoundsBetweenSteps(StableDiffusion3Pipeline):
    """As Mochi does: `step` gets float32 latents, and what it returns is rounded."""

    def __call__(self, prompt, num_inference_steps, generator=None, output_type="pt", return_dict=True):
        latents = self.prepare_latents(len(prompt), 4, 8, 8, self.transformer.dtype, "cpu", generator)
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            output = latents.sin().float()
            latents = self.scheduler.step(output, t, latents.float(), return_dict=False)[0].to(self.transformer.dtype)
        return (latents,)


def test_states_rounded_between_steps_pass():
    check(RoundsBetweenSteps(**sd3().to(torch.bfloat16).components), {}, guidance_scale=1.0, check_unguided=False)


def test_random_numbers_are_left_alone():
    given, replay = generators(), make_replay(sd3(), SHORT)
    before = [generator.get_state() for generator in given], torch.get_rng_state()
    check_replay(replay, {"prompt": PROMPTS}, given)
    assert all(torch.equal(a, g.get_state()) for a, g in zip(before[0], given, strict=True))
    assert torch.equal(before[1], torch.get_rng_state())


def expect(message, pipeline, kwargs=SHORT, **settings):
    with pytest.raises(ValueError, match=message) as error:
        check(pipeline, kwargs, **settings)
    assert str(error.value).startswith(f"{type(pipeline).__name__} cannot be trained, because it ")


def hooked(function, pipeline=None):
    """A pipeline whose denoiser's output goes through `function`."""
    pipeline = pipeline or sd3()

    def hook(module, args, output):
        return (function(output[0]),)

    denoiser(pipeline).register_forward_hook(hook)
    return pipeline


def test_a_random_prediction():
    expect("gives two predictions for the same input", hooked(lambda output: output + 1e-6 * torch.randn_like(output)))


class RemembersEarlierSteps(StableDiffusion3Pipeline):
    """As a guider with momentum does, which forgets at the first step."""

    def __call__(self, prompt, num_inference_steps, generator=None, output_type="pt", return_dict=True):
        latents = self.prepare_latents(len(prompt), 4, 8, 8, torch.float32, "cpu", generator)
        self.scheduler.set_timesteps(num_inference_steps)
        for i, t in enumerate(self.scheduler.timesteps):
            self.transformer.memory = 0 if i == 0 else self.transformer.memory + 1
            output = latents.sin() + self.transformer.memory
            latents = self.scheduler.step(output, t, latents, return_dict=False)[0]
        return (latents,)


def test_a_prediction_that_remembers():
    pipeline = RemembersEarlierSteps(**sd3().components)
    expect("gives two predictions for the same input; switch off what remembers", pipeline, {}, guidance_scale=1.0)


def test_a_prediction_that_is_not_finite():
    expect("predicts values that are not finite", hooked(lambda output: output / 0))


KLEIN = {"height": 16, "width": 16, "text_encoder_out_layers": (1, 2, 3), "max_sequence_length": 128}


@pytest.mark.parametrize("samples", [1, 2])
def test_a_list_of_images_that_are_references_of_every_sample(samples):
    """FLUX.2 shows every sample all images of the list; one sample may have several."""
    replay = make_replay(flux2_klein(), KLEIN)
    images = [[picture(1, 64), picture(2, 64)]] if samples == 1 else [picture(1, 64), picture(1, 64)]
    columns = {"prompt": PROMPTS[:samples], "image": images}
    if samples == 1:
        check_replay(replay, columns, generators((1,)))
    else:
        with pytest.raises(
            ValueError, match="makes the samples of a batch depend on each other's images; use per_device_train_batch_size=1"
        ):
            check_replay(replay, columns, generators())


@pytest.mark.parametrize("repainted", [8, 16])
def test_latents_changed_between_steps(repainted):
    """Inpainting with an ordinary UNet: what is known is put back after every step. A mask may happen to know nothing."""
    pipeline = StableDiffusionInpaintPipeline(**sd15().components, requires_safety_checker=False)
    mask = Image.new("L", (16, 16))
    mask.paste(255, (0, 0, repainted, 16))
    replay = make_replay(pipeline, {"height": 16, "width": 16, "strength": 1.0})
    with pytest.raises(ValueError, match="because it changes the latents between two steps .as inpainting does."):
        check_replay(replay, {"prompt": PROMPTS, "image": [picture(1)] * 2, "mask_image": [mask] * 2}, generators())


def test_a_start_shortly_before_the_end_passes():
    """K·strength rounds down to the steps that are taken; a call of two steps would take none."""
    pipeline = StableDiffusionImg2ImgPipeline(**sd15().components, requires_safety_checker=False)
    replay = make_replay(pipeline, {"strength": 0.3}, steps=10)
    check_replay(replay, {"prompt": PROMPTS, "image": [picture(1), picture(2)]}, generators())
    assert len(replay.timesteps) == 3


def test_a_network_that_is_another_with_gradient_checkpointing():
    """Chroma's single blocks lose their attention mask."""
    pipeline = chroma()
    size = {"height": 16, "width": 16, "max_sequence_length": 16}
    check(pipeline, size)
    pipeline.transformer.enable_gradient_checkpointing()
    expect(
        "predicts something else, by [0-9.]+%, when gradients are recorded; train without gradient checkpointing", pipeline, size
    )


def test_gradient_checkpointing_passes():
    pipeline = sd3()
    pipeline.transformer.enable_gradient_checkpointing()
    check(pipeline)


def test_the_network_that_is_trained_is_the_one_differentiated():
    """The second transformer predicts at the last steps only."""
    pipeline = wan22()
    size = {"height": 16, "width": 32, "num_frames": 5, "max_sequence_length": 16}
    pipeline.transformer_2.register_forward_hook(lambda module, args, output: (output[0].detach(),))
    columns = {"prompt": PROMPTS}
    scheduler = memoryless_scheduler(pipeline.scheduler)
    check_replay(PipelineReplay(pipeline, scheduler, STEPS, pipeline_kwargs=size), columns, generators())
    replay = PipelineReplay(pipeline, scheduler, STEPS, pipeline_kwargs=size, component="transformer_2")
    with pytest.raises(ValueError, match="differs from finite differences by 100.0%"):
        check_replay(replay, columns, generators())


def test_a_denoiser_without_gradient():
    expect("differs from finite differences by 100.0%", hooked(torch.Tensor.detach))


def test_a_denoiser_with_a_part_of_its_gradient_missing():
    """As in a mixture of experts that runs its experts under no_grad in evaluation mode: same output, plausible gradient."""
    pipeline = sd3()
    for block in pipeline.transformer.transformer_blocks:
        block.ff.net[-1].weight.data.mul_(5)  # random weights hardly use it
        block.ff.forward = torch.no_grad()(block.ff.forward)
    expect(r"differs from finite differences by [\d.]+%; remove torch.no_grad", pipeline)


def test_a_decoder_without_gradient():
    pipeline = sd15()
    pipeline.vae.decoder.register_forward_hook(lambda module, args, output: output.detach())
    expect("decodes without gradient", pipeline, {})


def test_a_decoder_with_noise_of_its_own():
    pipeline = sd15()
    pipeline.vae.decoder.register_forward_hook(lambda module, args, output: output + torch.randn_like(output))
    expect("decodes the same latents to other images each time", pipeline, {})


class Delegates(StableDiffusion3Pipeline):
    """Its own __call__ holds no loop, so neither no_grad nor the step index can be reached."""

    @torch.no_grad()
    def __call__(self, prompt, num_inference_steps, guidance_scale, generator=None, output_type="pt", return_dict=True):
        return super().__call__(
            prompt,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            generator=generator,
            output_type=output_type,
            return_dict=return_dict,
            max_sequence_length=8,
        )


def test_a_call_that_delegates_to_another():
    expect("decodes without gradient; remove .* from a __call__ of your own", Delegates(**sd3().components), {})


class LoopsInAMethod(StableDiffusion3Pipeline):
    """Its prediction depends on the step's number, which cannot be replayed out of another method's enumerate."""

    def __call__(self, prompt, num_inference_steps, generator=None, output_type="pt", return_dict=True):
        latents = self.prepare_latents(len(prompt), 4, 8, 8, torch.float32, "cpu", generator)
        self.scheduler.set_timesteps(num_inference_steps)
        return self.loop(latents)

    def loop(self, latents):
        for i, t in enumerate(self.scheduler.timesteps):
            latents = self.scheduler.step((i + 1) * latents, t, latents, return_dict=False)[0]
        return (latents,)


def test_a_step_number_out_of_reach():
    pipeline = LoopsInAMethod(**sd3().components)
    expect("hands another prediction to scheduler.step at step 1 than its replay", pipeline, {}, guidance_scale=1.0)


class PacksItsLatents(StableDiffusion3Pipeline):
    """A loop of its own that changes the latents before it starts."""

    def __call__(self, prompt, num_inference_steps, generator=None, output_type="pt", return_dict=True):
        latents = self.prepare_latents(len(prompt), 4, 8, 8, torch.float32, "cpu", generator).flatten(2).clone()
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            latents = self.scheduler.step(latents.sin(), t, latents, return_dict=False)[0]
        return (latents,)


class ScalesItsLatents(StableDiffusion3Pipeline):
    def __call__(self, prompt, num_inference_steps, generator=None, output_type="pt", return_dict=True):
        latents = 2 * self.prepare_latents(len(prompt), 4, 8, 8, torch.float32, "cpu", generator)
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            latents = self.scheduler.step(latents.sin(), t, latents, return_dict=False)[0]
        return (latents,)


def test_a_loop_that_starts_elsewhere():
    check(PacksItsLatents(**sd3().components), {}, guidance_scale=1.0, check_unguided=False)
    expect(
        "does not start its loop from what prepare_latents returns", ScalesItsLatents(**sd3().components), {}, guidance_scale=1.0
    )


class AlwaysGuided(StableDiffusion3Pipeline):
    @property
    def do_classifier_free_guidance(self):
        return True


class StillGuided(AlwaysGuided):
    @property
    def guidance_scale(self):
        return 2.0


def test_guidance_that_cannot_be_switched_off():
    expect("evaluates 4 rows for 2 samples without guidance", StillGuided(**sd3().components))
    check(StillGuided(**sd3().components), check_unguided=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_branch_that_is_evaluated_for_nothing(dtype):
    """At scale 1 it is added and taken away again, as OmniGen and Ideogram 4 do."""
    check(AlwaysGuided(**sd3().components).to(dtype))


class EncodesByGuidance(StableDiffusion3Pipeline):
    def encode_prompt(self, *args, do_classifier_free_guidance=True, **kwargs):
        encoded = super().encode_prompt(*args, do_classifier_free_guidance=do_classifier_free_guidance, **kwargs)
        return encoded if do_classifier_free_guidance else tuple(e if e is None else 2 * e for e in encoded)


def test_prompts_encoded_differently_without_guidance():
    check(EncodesByGuidance(**sd3().components))


def test_a_pipeline_that_takes_one_sample_is_told_from_one_that_fails():
    size = {"height": 16, "width": 16, "num_frames": 5, "max_sequence_length": 16}
    replay = make_replay(wan22_from_image(), size)
    columns = {"prompt": PROMPTS, "image": [picture(1), picture(2)]}
    with pytest.raises(
        ValueError, match=r"takes one sample at a time, not 2 \(ValueError: .image. has to be of type.*\); use per_"
    ):
        check_replay(replay, columns, generators())
    pipeline = StableDiffusionImg2ImgPipeline(**sd15(DDIMScheduler()).components, requires_safety_checker=False)
    replay = make_replay(pipeline, {"strength": 0.1})  # of 4 steps none is left
    with pytest.raises(
        ValueError, match=r"because it fails in its own call too \(RuntimeError: .*\); fix pipeline_kwargs"
    ) as told:
        check_replay(replay, {"prompt": PROMPTS, "image": [picture(1), picture(2)]}, generators())
    assert str(told.value).count("\n") == 0


class ReplaysBadly(StableDiffusion3Pipeline):
    """Counts the steps of its own loop."""

    def __call__(self, prompt, num_inference_steps, generator=None, output_type="pt", return_dict=True):
        latents = self.prepare_latents(len(prompt), 4, 8, 8, torch.float32, "cpu", generator)
        self.scheduler.set_timesteps(num_inference_steps)
        weights = {}
        for i, t in enumerate(self.scheduler.timesteps):
            weights[i] = weights[i - 1] + 1 if i else 1
            latents = self.scheduler.step(latents.sin() * weights[i], t, latents, return_dict=False)[0]
        return (latents,)


class StepsWithOptions(StableDiffusion3Pipeline):
    """As LTX-Condition does: an option of its scheduler's `step` that says which tokens are noisy."""

    def __call__(self, prompt, num_inference_steps, generator=None, output_type="pt", return_dict=True):
        latents = self.prepare_latents(len(prompt), 4, 8, 8, torch.float32, "cpu", generator)
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            tokens = latents.flatten(2)
            output = self.transformer.proj_out.weight[0, 0] * tokens
            noise = t.expand(tokens.shape[:2])
            tokens = self.scheduler.step(output, t, tokens, per_token_timesteps=noise, return_dict=False)[0]
            latents = tokens.view_as(latents)
        return (latents.clamp(0, 1),)


def test_a_scheduler_that_can_do_more_than_a_memoryless_one():
    """The user's own call is sound, and is not blamed."""
    pipeline = StepsWithOptions(**sd3().components)
    expect(
        "asks of its scheduler what its FlowMatchEulerDiscreteScheduler does and the MemorylessFlowMatchEulerDiscreteScheduler "
        r"that trains it does not \(ValueError: .*per_token_timesteps.*\); change or leave out the argument",
        pipeline,
        {},
        guidance_scale=1.0,
    )


def test_a_grid_that_only_the_pipelines_own_scheduler_takes():
    expect(
        "asks of its scheduler what its EulerDiscreteScheduler does and the MemorylessDDIMScheduler .*timestep.*; change or",
        sdxl(),
        {"timesteps": [999, 700, 400, 100]},
    )


def test_a_call_that_fails_with_its_own_scheduler_too():
    pipeline = hooked(lambda output: output)
    pipeline.transformer.register_forward_pre_hook(lambda module, args: 1 / 0)
    expect(r"fails in its own call too \(ZeroDivisionError: division by zero\); fix pipeline_kwargs", pipeline)


class InsistsOnItsChecker(StableDiffusion3Pipeline):
    """As Cosmos does: it refuses to run without its safety checker, and shows it numpy images."""

    def __call__(self, prompt, num_inference_steps, generator=None, output_type="pt", return_dict=True):
        if self.safety_checker is None:
            raise ValueError(f"You have disabled the safety checker for {self.__class__}, in violation of its licence.")
        latents = self.prepare_latents(len(prompt), 4, 8, 8, torch.float32, "cpu", generator)
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            output = self.transformer.proj_out.weight[0, 0] * latents
            latents = self.scheduler.step(output, t, latents, return_dict=False)[0]
        return (self.safety_checker(latents.clamp(0, 1)),)


def test_a_safety_checker_that_a_pipeline_insists_on_is_left_to_it():
    """A user who has disabled nothing is not told so; a checker that takes tensors is no obstacle."""
    pipeline = InsistsOnItsChecker(**sd3().components)
    pipeline.safety_checker = lambda images: torch.from_numpy(images.numpy())
    with pytest.raises(ValueError, match="safety checker, which takes them as numpy arrays") as error:
        check(pipeline, {}, guidance_scale=1.0, check_unguided=False)
    assert "decodes without gradient (RuntimeError: Can't call numpy() on Tensor that requires grad" in str(error.value)
    assert "disabled" not in str(error.value)

    seen = []
    pipeline.safety_checker = lambda images: seen.append(1) or images
    check(pipeline, {}, guidance_scale=1.0, check_unguided=False)
    assert seen

    pipeline.safety_checker = None  # and this user has
    expect(r"fails in its own call too \(ValueError: You have disabled", pipeline, {}, guidance_scale=1.0, check_unguided=False)


class PassesEverything:
    """Stands in for Cosmos's checker, which needs downloads."""

    def to(self, device):
        return self

    def check_text_safety(self, prompt):
        return True

    def check_video_safety(self, frames):
        return frames


def test_cosmos_is_refused_in_our_words():
    torch.manual_seed(0)
    encoder, tokenizer = t5()
    transformer = CosmosTransformer3DModel(
        in_channels=16,
        out_channels=16,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        mlp_ratio=2,
        text_embed_dim=32,
        adaln_lora_dim=4,
        max_size=(4, 32, 32),
        concat_padding_mask=False,
    )
    pipeline = Cosmos2TextToImagePipeline(
        transformer=transformer,
        vae=AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1),
        scheduler=FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True),
        text_encoder=encoder,
        tokenizer=tokenizer,
        safety_checker=PassesEverything(),
    )
    size = {"height": 32, "width": 32, "max_sequence_length": 16}
    with pytest.raises(ValueError, match="Cosmos2TextToImagePipeline cannot be trained, because it ") as error:
        check(pipeline, size)
    assert "disabled" not in str(error.value)
    assert "own call too" not in str(error.value)


class CachesItsFirstStep(StableDiffusion3Pipeline):
    """As FLUX.2-klein-KV does with the keys and values of its references."""

    def __call__(self, prompt, num_inference_steps, generator=None, output_type="pt", return_dict=True):
        latents = self.prepare_latents(len(prompt), 4, 8, 8, torch.float32, "cpu", generator)
        self.scheduler.set_timesteps(num_inference_steps)
        cache = None
        for i, t in enumerate(self.scheduler.timesteps):
            cache = latents.cos() if i == 0 else cache
            output = latents.sin() if cache is None else latents.sin() + cache
            latents = self.scheduler.step(output, t, latents, return_dict=False)[0]
        return (latents.clamp(0, 1),)


def test_a_cache_of_an_earlier_step_is_named():
    expect(
        "at step 1 than its replay; use a pipeline whose own __call__ loops over scheduler.timesteps, and keeps nothing of an "
        "earlier step .a cache of keys and values",
        CachesItsFirstStep(**sd3().components),
        {},
        guidance_scale=1.0,
    )


def test_kernels_without_a_backward_pass():
    """Flex attention on a CPU raises as soon as gradients are recorded."""
    pipeline = flux()
    pipeline.transformer.set_attention_backend("flex")
    size = {"height": 16, "width": 16, "max_sequence_length": 16}
    try:
        expect(r"predicts without gradient \(.*backward on CPU.*\); take other attention kernels", pipeline, size)
    finally:
        pipeline.transformer.set_attention_backend("native")  # diffusers sets it for all networks of the process


class WithoutBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise NotImplementedError("this kernel has no backward pass")


def test_a_decoder_that_fails_on_its_way_back():
    pipeline = sd15()
    pipeline.vae.decoder.register_forward_hook(lambda module, args, output: WithoutBackward.apply(output))
    expect(r"decodes without gradient \(NotImplementedError: this kernel has no backward pass\); remove", pipeline, {})


def test_a_decoder_that_fails_without_gradient_too():
    pipeline = sd15()
    pipeline.vae.decoder.register_forward_pre_hook(lambda module, args: 1 / 0)
    expect(r"fails in its own call too \(ZeroDivisionError: division by zero\)", pipeline, {})


def test_an_error_of_the_replay_alone():
    expect(r"fails in its replay, not in its own call \(KeyError: 2\)", ReplaysBadly(**sd3().components), {}, guidance_scale=1.0)


class ReturnsOneOfThem(StableDiffusion3Pipeline):
    def __call__(self, prompt, num_inference_steps, generator=None, output_type="pt", return_dict=True):
        latents = self.prepare_latents(len(prompt), 4, 8, 8, torch.float32, "cpu", generator)
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            latents = self.scheduler.step(latents.sin(), t, latents, return_dict=False)[0]
        return (latents[:1].clamp(0, 1),)


def test_an_output_for_one_sample():
    pipeline = ReturnsOneOfThem(**sd3().components)
    expect("returns 1 images for 2 samples", pipeline, {}, guidance_scale=1.0, check_unguided=False)


class DecodesAnotherStep(StableDiffusion3Pipeline):
    """Its output is not a function of the last latents."""

    def __call__(self, prompt, num_inference_steps, generator=None, output_type="pt", return_dict=True):
        latents = self.prepare_latents(len(prompt), 4, 8, 8, torch.float32, "cpu", generator)
        self.scheduler.set_timesteps(num_inference_steps)
        average = latents
        for t in self.scheduler.timesteps:
            output = self.transformer.proj_out.weight[0, 0] * latents
            latents = self.scheduler.step(output, t, latents, return_dict=False)[0]
            average = 0.5 * (average + latents)
        return (average.clamp(0, 1),)


def test_an_output_that_is_not_decoded_from_the_last_latents():
    expect(
        "decodes the same latents to other images",
        DecodesAnotherStep(**sd3().components),
        {},
        guidance_scale=1.0,
        check_unguided=False,
    )
