"""FLUX.2-klein with PickScore: the undistilled 4B model, for training.

    python examples/flux2_klein.py                        # settings: recipes/flux2_klein.yaml
    accelerate launch examples/flux2_klein.py --max_steps 500
    python examples/flux2_klein.py --smoke                # a tiny pipeline, two updates, seconds on a CPU

Hardware: needs about 32 GB of GPU memory (estimate).
Run so far: --smoke. Not run on the published weights: no GPU, no Hub here; the settings are untuned.

The recipe names FLUX.2-klein-base-4B, a flow model with guidance. FLUX.2-klein-4B, distilled to four steps without
guidance, runs too: `--model_name_or_path black-forest-labs/FLUX.2-klein-4B --num_inference_steps 8`. Its target is then
the tilt of what its own memoryless sampler draws in these steps; how far its four-step sampler follows has not been
measured.
"""

from common import read_arguments
from diffusers import Flux2KleinPipeline

from diffusers_adjoint import AdjointMatchingTrainer
from diffusers_adjoint.cli.commands import load_prompts, load_rewards, lora_config


def main() -> None:
    arguments = read_arguments("flux2_klein")
    pipe = Flux2KleinPipeline.from_pretrained(arguments.model.model_name_or_path, **arguments.config.model_init_kwargs)
    if pipe.config.is_distilled:  # it ignores guidance; so must the settings
        arguments.config.guidance_scale = 1.0
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
