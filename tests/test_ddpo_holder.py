"""The old holder of a Stable Diffusion pipeline: what scripts ask of it works, and what has no meaning here is told."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from tiny_pipelines import sd15

from diffusers_adjoint.ddpo import DDPOConfig, DDPOTrainer, DefaultDDPOStableDiffusionPipeline


def brightness(images, prompts, metadata):
    return images.mean((1, 2, 3)), {}


@pytest.fixture
def base(tmp_path):
    sd15().save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def make_trainer(holder, folder, **changes):
    config = DDPOConfig(logdir=str(folder), num_epochs=1, sample_num_steps=3, sample_guidance_scale=1.0, sample_batch_size=2)
    settings = {"use_cpu": True, "disable_tqdm": True, "reward_scale": 50.0, "learning_rate": 0.1} | changes
    return DDPOTrainer(config, brightness, lambda: ("a cat", {}), holder, **settings)


def trained(holder, folder):
    make_trainer(holder, folder).train()
    return holder


def trainable(trainer):
    return {name for name, parameter in trainer.denoiser.network.named_parameters() if parameter.requires_grad}


def pixels(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipeline("a cat", num_inference_steps=2, generator=generator, output_type="pt").images


def test_it_is_called_and_shows_its_parts_as_before(base):
    holder = DefaultDDPOStableDiffusionPipeline(base, pretrained_model_revision="main")
    plain = StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
    assert torch.equal(pixels(holder), pixels(plain))
    for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler", "safety_checker"):
        assert getattr(holder, part) is getattr(holder.sd_pipeline, part)
    assert (holder.pretrained_model, holder.pretrained_revision, holder.use_lora) == (base, "main", True)


@pytest.mark.parametrize("use_lora", [True, False])
def test_it_says_whether_there_is_a_lora(use_lora, base, tmp_path):
    holder = DefaultDDPOStableDiffusionPipeline(base, use_lora=use_lora)
    trainer = make_trainer(holder, tmp_path)
    assert {"lora" in name for name in trainable(trainer)} == {use_lora}
    assert trainer.pipeline is holder.sd_pipeline and trainer.sd_pipeline is holder
    layers = holder.get_trainable_layers()
    assert {name for name, p in layers.named_parameters() if p.requires_grad} == trainable(trainer)


def test_another_lora_is_an_argument(base, tmp_path):
    holder = DefaultDDPOStableDiffusionPipeline(base)
    trainer = make_trainer(holder, tmp_path, peft_config=LoraConfig(r=3, target_modules=["to_q"]))
    assert {"to_q" in name for name in trainable(trainer)} == {True}
    assert {p.shape[0] for name, p in trainer.denoiser.network.named_parameters() if "lora_A" in name} == {3}


@pytest.mark.parametrize("use_lora", [True, False])
def test_what_it_saves_is_the_tuned_model(use_lora, base, tmp_path):
    """As before, beside the pipeline lies the LoRA, which the holder reads with it."""
    holder = trained(DefaultDDPOStableDiffusionPipeline(base, use_lora=use_lora), tmp_path / "run")
    tuned, untuned = pixels(holder), pixels(sd15())
    holder.save_pretrained(str(tmp_path / "saved"))
    assert torch.equal(pixels(holder), tuned) and not torch.equal(tuned, untuned)
    assert torch.equal(pixels(DefaultDDPOStableDiffusionPipeline(str(tmp_path / "saved"))), tuned)
    plain = StableDiffusionPipeline.from_pretrained(tmp_path / "saved", safety_checker=None)
    assert torch.equal(pixels(plain), untuned if use_lora else tuned)


def test_a_saved_lora_belongs_to_the_base_of_the_next_training(base, tmp_path, caplog):
    trained(DefaultDDPOStableDiffusionPipeline(base), tmp_path / "first").save_pretrained(str(tmp_path / "saved"))
    second = DefaultDDPOStableDiffusionPipeline(str(tmp_path / "saved"), use_lora=False)
    assert second.use_lora and "a new LoRA is trained on top of it" in caplog.text
    before = pixels(second)
    trained(second, tmp_path / "second")
    tuned = pixels(second)
    assert not torch.equal(tuned, before)
    second.save_pretrained(str(tmp_path / "twice"))
    # The first LoRA is added to the saved weights, in another order of summation.
    torch.testing.assert_close(pixels(DefaultDDPOStableDiffusionPipeline(str(tmp_path / "twice"))), tuned, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("rgb_with_grad", "call the holder"),
        ("scheduler_step", "scheduler.step"),
        ("autocast", "mixed_precision"),
        ("save_checkpoint", "save_freq"),
        ("load_checkpoint", "resume_from"),
    ],
)
def test_what_has_no_meaning_here_says_so(name, instead, base):
    holder = DefaultDDPOStableDiffusionPipeline(base)
    with pytest.raises(AttributeError, match=f"DefaultDDPOStableDiffusionPipeline has no {name}: .*{instead}.*\\.$"):
        getattr(holder, name)
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        holder.nonsense  # noqa: B018


class Own(DefaultDDPOStableDiffusionPipeline):
    def __call__(self, *args, **kwargs):
        raise AssertionError("not reached")

    def get_trainable_layers(self):
        raise AssertionError("not reached")


def test_methods_of_ones_own_that_are_not_called_are_named(base, tmp_path, caplog):
    make_trainer(DefaultDDPOStableDiffusionPipeline(base), tmp_path)
    make_trainer(SimpleNamespace(sd_pipeline=sd15(), use_lora=True), tmp_path)
    assert not caplog.messages
    make_trainer(Own(base), tmp_path)
    (message,) = caplog.messages
    assert message.startswith("Own: __call__ and get_trainable_layers are not called") and "peft_config" in message
