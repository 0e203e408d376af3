"""Your own reward: any function of the pixels that PyTorch can differentiate.

    python examples/own_reward.py                        # settings: recipes/own_reward.yaml
    accelerate launch examples/own_reward.py --max_steps 500
    python examples/own_reward.py --smoke                # a tiny pipeline, two updates, seconds on a CPU

Hardware: needs about 12 GB of GPU memory (estimate).
Run so far: --smoke. Not run on the published weights: no GPU, no Hub here; the settings are untuned.

The same from the command line, with the function named by its file:

    diffusers-adjoint train --config examples/recipes/own_reward.yaml --reward_funcs examples/own_reward.py:warm_light
"""

from common import read_arguments
from diffusers import StableDiffusionPipeline
from torch import Tensor
from trl import ScriptArguments

from diffusers_adjoint import AdjointMatchingTrainer
from diffusers_adjoint.cli.commands import load_prompts, lora_config


def warm_light(images: Tensor, prompts: list[str]) -> Tensor:
    """Red minus blue, averaged over each image: from -1 (cold) to 1 (warm).

    Stay in PyTorch: PIL, `.item()`, `.detach()` or rounding would cut the gradient. A reward with its own network is a
    `torch.nn.Module` with this `forward`; the trainer freezes it and moves it to the device. A further argument, such
    as `author`, receives the dataset column of that name, one value an image.

    Args:
        images: (B, 3, H, W) in [0, 1].
        prompts: one for each image; unused here.
    """
    return (images[:, 0] - images[:, 2]).mean((1, 2))


def main() -> None:
    arguments = read_arguments("own_reward", ScriptArguments)
    pipe = StableDiffusionPipeline.from_pretrained(arguments.model.model_name_or_path, **arguments.config.model_init_kwargs)
    trainer = AdjointMatchingTrainer(
        model=pipe,
        reward_funcs=warm_light,
        args=arguments.config,
        train_dataset=load_prompts(arguments.script, arguments.script.dataset_train_split),
        peft_config=lora_config(arguments.model),
    )
    trainer.train(resume_from_checkpoint=arguments.resume)
    trainer.save_model()  # with --push_to_hub true, to the Hub too


if __name__ == "__main__":
    main()
