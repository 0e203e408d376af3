"""Qwen-Image with PickScore: true classifier-free guidance against a negative prompt.

    python examples/qwen_image.py                        # settings: recipes/qwen_image.yaml
    accelerate launch examples/qwen_image.py --max_steps 500
    python examples/qwen_image.py --smoke                # a tiny pipeline, two updates, seconds on a CPU

Hardware: needs about 80 GB of GPU memory (estimate).
Run so far: --smoke. Not run on the published weights: no GPU, no Hub here; the settings are untuned.

The trainer's `guidance_scale` becomes `true_cfg_scale`, which Qwen-Image applies only together with a negative prompt:
a dataset column of that name carries it. The recipe guides the trajectories and leaves the loss unguided (`cfg_mode:
rollout`), at the cost of two network calls a step in the rollout; docs/guidance.md says what that targets, and what the
other modes do.
"""

from common import read_arguments
from diffusers import QwenImagePipeline

from diffusers_adjoint import AdjointMatchingTrainer
from diffusers_adjoint.cli.commands import load_prompts, load_rewards, lora_config

NEGATIVE_PROMPT = " "  # what the model was sampled with when it was published


def main() -> None:
    arguments = read_arguments("qwen_image")
    pipe = QwenImagePipeline.from_pretrained(arguments.model.model_name_or_path, **arguments.config.model_init_kwargs)
    pipe.vae.enable_tiling()  # large images go through the decoder in overlapping tiles
    dataset = load_prompts(arguments.script, arguments.script.dataset_train_split)
    trainer = AdjointMatchingTrainer(
        model=pipe,
        reward_funcs=load_rewards(arguments.script.reward_funcs),
        args=arguments.config,
        train_dataset=dataset.map(lambda row: {"negative_prompt": NEGATIVE_PROMPT}),
        peft_config=lora_config(arguments.model),
    )
    trainer.train(resume_from_checkpoint=arguments.resume)
    trainer.save_model()  # with --push_to_hub true, to the Hub too


if __name__ == "__main__":
    main()
