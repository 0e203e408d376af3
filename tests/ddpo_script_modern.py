import random
from dataclasses import dataclass

from datasets import IterableDataset
from diffusers import DiffusionPipeline
from peft import LoraConfig
from transformers import HfArgumentParser

from diffusers_adjoint import AdjointMatchingConfig, AdjointMatchingTrainer

SUBJECTS = ["a cat", "a dog", "a harbour", "a bowl of fruit"]


@dataclass
class ScriptArguments:
    pretrained_model: str = "stable-diffusion-v1-5/stable-diffusion-v1-5"


def draw_prompts():
    draws = random.Random(0)
    while True:
        yield {"prompt": f"{draws.choice(SUBJECTS)} at dusk"}


def warmth(images, prompts):
    red, _, blue = images.mean((2, 3)).unbind(1)
    return red - blue


if __name__ == "__main__":
    script_args, args = HfArgumentParser((ScriptArguments, AdjointMatchingConfig)).parse_args_into_dataclasses()
    trainer = AdjointMatchingTrainer(
        DiffusionPipeline.from_pretrained(script_args.pretrained_model),
        warmth,
        args,
        IterableDataset.from_generator(draw_prompts),
        peft_config=LoraConfig(r=4, lora_alpha=4),
    )
    trainer.train()
    trainer.save_model()
