"""A script for TRL's DDPOTrainer in the shape of TRL's ddpo.py: its own scorer, without a gradient, and the same last lines."""
# ruff: noqa: I001  (the lines that docs/migrating_from_ddpo.md changes stand where people have them)

import os
from dataclasses import dataclass

import numpy as np
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.utils import EntryNotFoundError
from transformers import CLIPModel, CLIPProcessor, HfArgumentParser
from trl import DDPOConfig, DDPOTrainer, DefaultDDPOStableDiffusionPipeline

SUBJECTS = ["a cat", "a dog", "a harbour", "a bowl of fruit"]


@dataclass
class ScriptArguments:
    pretrained_model: str = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    pretrained_revision: str = "main"
    head: str = "trl-lib/ddpo-aesthetic-predictor"
    head_filename: str = "aesthetic-model.pth"
    use_lora: bool = True


class Head(torch.nn.Module):
    def __init__(self, weights):
        super().__init__()
        self.layers = torch.nn.ModuleDict()
        for number in sorted({int(name.split(".")[1]) for name in weights}):
            width = weights[f"layers.{number}.weight"].shape
            self.layers[str(number)] = torch.nn.Linear(width[1], width[0])
        self.load_state_dict(weights)

    @torch.no_grad()
    def forward(self, features):
        for layer in self.layers.values():
            features = layer(features)
        return features


class Scorer(torch.nn.Module):
    def __init__(self, repository, filename, dtype):
        super().__init__()
        self.clip = CLIPModel.from_pretrained("openai/clip-vit-large-patch14")
        self.processor = CLIPProcessor.from_pretrained("openai/clip-vit-large-patch14")
        try:
            file = hf_hub_download(repository, filename)
        except EntryNotFoundError:
            file = os.path.join(repository, filename)
        self.head = Head(torch.load(file, map_location="cpu", weights_only=True))
        self.dtype = dtype
        self.eval()

    @torch.no_grad()
    def __call__(self, images):
        pixels = self.processor(images=images, return_tensors="pt")["pixel_values"]
        features = self.clip.get_image_features(pixel_values=pixels.to(self.dtype))
        return self.head(features / features.norm(dim=-1, keepdim=True)).squeeze(1)


def make_reward(repository, filename):
    scorer = Scorer(repository, filename, torch.float32)
    if torch.cuda.is_available():
        scorer = scorer.cuda()

    def score(images, prompts, metadata):
        images = (images * 255).round().clamp(0, 255).to(torch.uint8)
        return scorer(images), {}

    return score


def draw_prompt():
    return np.random.choice(SUBJECTS), {}


def log_samples(image_data, global_step, tracker):
    images, prompts, _, rewards, _ = image_data[-1]
    shown = {f"{prompts[i]:.25} | {rewards[i].item():.2f}": image[None].float() for i, image in enumerate(images)}
    tracker.log_images(shown, step=global_step)


if __name__ == "__main__":
    script_args, training_args = HfArgumentParser((ScriptArguments, DDPOConfig)).parse_args_into_dataclasses()
    training_args.project_kwargs = {
        "logging_dir": "./logs",
        "automatic_checkpoint_naming": True,
        "total_limit": 5,
        "project_dir": "./save",
    }
    pipeline = DefaultDDPOStableDiffusionPipeline(
        script_args.pretrained_model,
        pretrained_model_revision=script_args.pretrained_revision,
        use_lora=script_args.use_lora,
    )
    trainer = DDPOTrainer(
        training_args,
        make_reward(script_args.head, script_args.head_filename),
        draw_prompt,
        pipeline,
        image_samples_hook=log_samples,
    )
    trainer.train()
    trainer.save_model(training_args.output_dir)
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
