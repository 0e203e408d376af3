"""Z-Image as a modular pipeline with PickScore: blocks in place of a call, and guidance by a guider.

    python examples/z_image_modular.py                        # settings: recipes/z_image_modular.yaml
    accelerate launch examples/z_image_modular.py --max_steps 500
    python examples/z_image_modular.py --smoke                # a tiny pipeline, two updates, seconds on a CPU

Hardware: needs about 48 GB of GPU memory (estimate).
Run so far: --smoke. Not run on the published weights: no GPU, no Hub here; the settings are untuned.

Any other modular pipeline goes the same way, FLUX.3 with `per_device_train_batch_size: 1` and `num_generations: 1`, as it
takes one prompt and one image a call. The LoRA is loaded by `pipe.load_lora_weights("out/z_image_modular")`.
"""

from common import read_arguments
from diffusers import ModularPipeline

from diffusers_adjoint import AdjointMatchingTrainer
from diffusers_adjoint.cli.commands import load_prompts, load_rewards, lora_config


def main() -> None:
    arguments = read_arguments("z_image_modular")
    kwargs = dict(arguments.config.model_init_kwargs)
    revision = kwargs.pop("revision")
    pipe = ModularPipeline.from_pretrained(arguments.model.model_name_or_path, workflow="text2image", revision=revision)
    pipe.load_components(**kwargs)
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
