"""A script for TRL's AlignPropTrainer in the shape of TRL's alignprop.py, whose scorer comes from TRL."""
# ruff: noqa: I001  (the lines that docs/migrating_from_ddpo.md changes stand where people have them)

from dataclasses import dataclass

import numpy as np
from transformers import HfArgumentParser
from trl import AlignPropConfig, AlignPropTrainer, DefaultDDPOStableDiffusionPipeline
from trl.models.auxiliary_modules import aesthetic_scorer

SUBJECTS = ["a cat", "a dog", "a harbour", "a bowl of fruit"]


@dataclass
class ScriptArguments:
    pretrained_model: str = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    pretrained_revision: str = "main"
    head: str = "trl-lib/ddpo-aesthetic-predictor"
    head_filename: str = "aesthetic-model.pth"
    use_lora: bool = True


def draw_prompt():
    return np.random.choice(SUBJECTS), {}


def log_samples(pairs, global_step, tracker):
    images, prompts = pairs["images"], pairs["prompts"]
    tracker.log_images({f"{prompts[i]}": image[None].float() for i, image in enumerate(images[:4])}, step=global_step)


if __name__ == "__main__":
    script_args, training_args = HfArgumentParser((ScriptArguments, AlignPropConfig)).parse_args_into_dataclasses()
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
    trainer = AlignPropTrainer(
        training_args,
        aesthetic_scorer(script_args.head, script_args.head_filename),
        draw_prompt,
        pipeline,
        image_samples_hook=log_samples,
    )
    trainer.train()
    trainer.save_model(training_args.output_dir)
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
