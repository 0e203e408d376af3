"""Full fine-tuning: every weight of the UNet of Stable Diffusion 1.5, no adapter.

    python examples/full_finetuning.py                        # settings: recipes/full_finetuning.yaml
    accelerate launch examples/full_finetuning.py --max_steps 500
    python examples/full_finetuning.py --smoke                # a tiny pipeline, two updates, seconds on a CPU

Hardware: needs about 32 GB of GPU memory (estimate).
Run so far: --smoke. Not run on the published weights: no GPU, no Hub here; the settings are untuned.

Without `peft_config` the trainer keeps a frozen copy of the network as the base: twice the weights, besides gradients
and optimizer. The weights stay in float32, where small updates are not rounded away, and `bf16: true` runs the network
in bfloat16. What is saved is a whole pipeline, loaded by
`StableDiffusionPipeline.from_pretrained("out/full_finetuning")`.
"""

from common import read_arguments
from diffusers import StableDiffusionPipeline

from diffusers_adjoint import AdjointMatchingTrainer
from diffusers_adjoint.cli.commands import load_prompts, load_rewards


def main() -> None:
    arguments = read_arguments("full_finetuning")
    if arguments.model.use_peft:
        raise ValueError("use_peft asks for an adapter; leave it out for full fine-tuning, or take examples/sd15.py.")
    pipe = StableDiffusionPipeline.from_pretrained(arguments.model.model_name_or_path, **arguments.config.model_init_kwargs)
    pipe.vae.enable_slicing()  # one image at a time through the decoder, and back
    trainer = AdjointMatchingTrainer(
        model=pipe,
        reward_funcs=load_rewards(arguments.script.reward_funcs),
        args=arguments.config,
        train_dataset=load_prompts(arguments.script, arguments.script.dataset_train_split),
        peft_config=None,
    )
    trainer.train(resume_from_checkpoint=arguments.resume)
    trainer.save_model()  # with --push_to_hub true, to the Hub too


if __name__ == "__main__":
    main()
