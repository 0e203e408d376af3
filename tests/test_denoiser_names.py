"""A pipeline's network may have any name: by it, it is trained, saved and loaded."""

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from diffusers.utils.torch_utils import randn_tensor
from peft import LoraConfig
from safetensors.torch import load_file
from tiny_pipelines import sd3, sd15
from tiny_trainer import make_trainer

from diffusers_adjoint.replay.view import denoiser_names


class NamedOtherwise(DiffusionPipeline):
    def __init__(self, backbone, scheduler):
        super().__init__()
        self.register_modules(backbone=backbone, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, batch_size=1, generator=None, num_inference_steps=4, output_type="pt", return_dict=True):
        x = randn_tensor((batch_size, 4, 8, 8), generator=generator)
        text = torch.linspace(-1, 1, 64).view(1, 2, 32).expand(batch_size, -1, -1)
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            output = self.backbone(x, t, encoder_hidden_states=text).sample
            x = self.scheduler.step(output, t, x, generator=generator, return_dict=False)[0]
        return ((x[:, :3] / 2 + 0.5).clamp(0, 1),)


def build():
    pipeline = NamedOtherwise(sd15().unet, DDIMScheduler(clip_sample=False))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_any_network_is_trained_by_its_name(tmp_path):
    options = {"trained_component": "backbone", "rows": [""] * 4, "reward_scale": 1e4}
    trainer = make_trainer(tmp_path, build, peft_config=LoraConfig(r=2), learning_rate=0.1, **options)
    trainer.train()
    trainer.save_model()
    assert all(value.abs().max() > 0 for value in load_file(tmp_path / "pytorch_lora_weights.safetensors").values())
    fresh, base = build(), build()
    fresh.backbone.load_lora_adapter(tmp_path, prefix=None, weight_name="pytorch_lora_weights.safetensors")
    images = [pipeline(2, generator=torch.Generator().manual_seed(0))[0] for pipeline in (trainer.pipeline, fresh, base)]
    change = (images[0] - images[2]).abs().max()
    assert change > 1e-3 and (images[1] - images[0]).abs().max() < 1e-3 * change
    assert "pipe.backbone.load_lora_adapter(" in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_without_a_name_it_is_asked_for():
    with pytest.raises(
        ValueError, match="NamedOtherwise has no transformer and no unet; pass the name of its network as trained"
    ):
        denoiser_names(build())
    assert denoiser_names(build(), "backbone") == ["backbone"]
    with pytest.raises(ValueError, match="has no denoiser 'scheduler' to train; pass one of backbone"):
        denoiser_names(build(), "scheduler")


def test_further_networks_that_predict_are_known_by_their_names():
    """As Ideogram 4 has one for the predictions without a prompt."""
    pipeline = sd3()
    pipeline.register_modules(unconditional_transformer=sd3().transformer)
    assert denoiser_names(pipeline) == ["transformer", "unconditional_transformer"]
    assert denoiser_names(sd3(), "vae") == ["transformer", "vae"]


def test_a_network_that_does_not_predict_is_refused(tmp_path):
    trainer = make_trainer(tmp_path, trained_component="vae", lora=False, pipeline_kwargs={"max_sequence_length": 8})
    with pytest.raises(ValueError, match="does not use its vae at any of 4 steps; take another trained_component"):
        trainer.train()
