"""Stable Diffusion 3.5 medium with PickScore: a flow with three text encoders.

    python examples/sd35_medium.py                        # settings: recipes/sd35_medium.yaml
    accelerate launch examples/sd35_medium.py --max_steps 500
    python examples/sd35_medium.py --smoke                # a tiny pipeline, two updates, seconds on a CPU

Hardware: needs about 24 GB of GPU memory (estimate).
Run so far: --smoke. Not run on the published weights: no GPU, no Hub here; the settings are untuned.

Its blocks attend to image and text together: the recipe's `lora_target_modules` name the projections of both streams,
where the default adapts the image's alone. The T5 encoder is larger than the network in training;
`offload_text_encoders` keeps it on the CPU between prompts, and `max_sequence_length` cuts what it writes.
"""

from common import read_arguments
from diffusers import StableDiffusion3Pipeline

from diffusers_adjoint import AdjointMatchingTrainer
from diffusers_adjoint.cli.commands import load_prompts, load_rewards, lora_config


def main() -> None:
    arguments = read_arguments("sd35_medium")
    pipe = StableDiffusion3Pipeline.from_pretrained(arguments.model.model_name_or_path, **arguments.config.model_init_kwargs)
    pipe.vae.enable_slicing()  # one image at a time through the decoder, and back
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
