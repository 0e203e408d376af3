"""FLUX.1-dev with PickScore: guidance is an input of the network.

    python examples/flux1_dev.py                        # settings: recipes/flux1_dev.yaml
    accelerate launch examples/flux1_dev.py --max_steps 500
    python examples/flux1_dev.py --smoke                # a tiny pipeline, two updates, seconds on a CPU

Hardware: needs about 48 GB of GPU memory (estimate).
Run so far: --smoke. Not run on the published weights: no GPU, no Hub here; the settings are untuned.

FLUX.1-dev was distilled on guided predictions and takes the guidance scale as a condition: `guidance_scale` is 3.5 in
training as in use, every prediction is a single one, and `cfg_mode` has nothing to do. The weights are gated: accept
their licence on the Hub first.
"""

from common import read_arguments
from diffusers import FluxPipeline

from diffusers_adjoint import AdjointMatchingTrainer
from diffusers_adjoint.cli.commands import load_prompts, load_rewards, lora_config


def main() -> None:
    arguments = read_arguments("flux1_dev")
    pipe = FluxPipeline.from_pretrained(arguments.model.model_name_or_path, **arguments.config.model_init_kwargs)
    if not pipe.transformer.config.guidance_embeds:  # FLUX.1-schnell: the same class, but 3.5 would be real guidance there
        raise ValueError(f"{arguments.model.model_name_or_path} has no guidance embedding; pass the weights of FLUX.1-dev.")
    pipe.vae.enable_tiling()  # large images go through the decoder in overlapping tiles
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
