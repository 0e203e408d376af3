"""A script for TRL's DDPOTrainer as people have them."""
# ruff: noqa: I001  (only the import may differ between the old script and the new one)

import random
from dataclasses import dataclass

import torch
from transformers import HfArgumentParser
from diffusers_adjoint.ddpo import DDPOConfig, DDPOTrainer, DefaultDDPOStableDiffusionPipeline

SUBJECTS = ["a cat", "a dog", "a harbour", "a bowl of fruit"]


@dataclass
class ScriptArguments:
    pretrained_model: str = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    pretrained_revision: str = "main"
    use_lora: bool = True
    lora_folder: str = "warm"


def draw_prompt():
    subject = random.choice(SUBJECTS)
    return f"{subject} at dusk", {"subject": subject}


class Warmth(torch.nn.Module):
    def forward(self, pixels):
        red, _, blue = pixels.float().mean((2, 3)).unbind(1)
        return (red - blue) / 255


scorer = Warmth()


def warmth(images, prompts, metadata):
    pixels = images * 255
    return scorer(pixels), {}


def log_samples(image_data, global_step, tracker):
    images, prompts, _, rewards, _ = image_data[-1]
    named = {f"{prompt} | {reward:.2f}": image[None] for image, prompt, reward in zip(images, prompts, rewards, strict=True)}
    tracker.log_images(named, step=global_step)


if __name__ == "__main__":
    script_args, config = HfArgumentParser((ScriptArguments, DDPOConfig)).parse_args_into_dataclasses()
    config.project_kwargs = {"automatic_checkpoint_naming": True, "total_limit": 5, "project_dir": "./save"}
    pipeline = DefaultDDPOStableDiffusionPipeline(
        script_args.pretrained_model,
        pretrained_model_revision=script_args.pretrained_revision,
        use_lora=script_args.use_lora,
    )
    trainer = DDPOTrainer(config, warmth, draw_prompt, pipeline, image_samples_hook=log_samples, reward_scale=50.0)
    trainer.train()
    trainer.save_pretrained(script_args.lora_folder)
