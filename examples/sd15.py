"""Stable Diffusion 1.5 with PickScore: a UNet that predicts noise.

    python examples/sd15.py                        # settings: recipes/sd15.yaml
    accelerate launch examples/sd15.py --max_steps 500
    python examples/sd15.py --smoke                # a tiny pipeline, two updates, seconds on a CPU

Hardware: needs about 12 GB of GPU memory (estimate).
Run so far: --smoke. Not run on the published weights: no GPU, no Hub here; the settings are untuned.

The published pipeline samples with PNDM. Training uses its memoryless DDIM counterpart whatever the scheduler; DDIM is
put in here so that evaluation and sample images come from the deterministic sampler of the same family. The recipe
leaves the safety checker out: it blackens images, and rewards would see that.
"""

from common import read_arguments
from diffusers import DDIMScheduler, StableDiffusionPipeline

from diffusers_adjoint import AdjointMatchingTrainer
from diffusers_adjoint.cli.commands import load_prompts, load_rewards, lora_config


def main() -> None:
    arguments = read_arguments("sd15")
    pipe = StableDiffusionPipeline.from_pretrained(arguments.model.model_name_or_path, **arguments.config.model_init_kwargs)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    trainer = AdjointMatchingTrainer(
        model=pipe,
        reward_funcs=load_rewards(arguments.script.reward_funcs),
        args=arguments.config,
        train_dataset=load_prompts(arguments.script, arguments.script.dataset_train_split),
        peft_config=lora_config(arguments.model),
    )
    trainer.train(resume_from_checkpoint=arguments.resume)
    trainer.save_model()  # with --push_to_hub true, to the Hub too


if __name__ == "__main__":
    main()
