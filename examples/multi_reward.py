"""Several rewards at once: PickScore, and a penalty on saturated pixels, which it prefers too much.

    python examples/multi_reward.py                        # settings: recipes/multi_reward.yaml
    accelerate launch examples/multi_reward.py --max_steps 500
    python examples/multi_reward.py --smoke                # a tiny pipeline, two updates, seconds on a CPU

Hardware: needs about 24 GB of GPU memory (estimate).
Run so far: --smoke. Not run on the published weights: no GPU, no Hub here; the settings are untuned.

The target is p_base·exp(λ Σ wᵢ rᵢ): `reward_scale` is λ, `reward_weights` are the wᵢ in the order of `reward_funcs`,
and each reward is logged under its own name. Prompts held out (`dataset_test_split`) are evaluated during training,
with the pipeline's own sampler.
"""

from dataclasses import dataclass, field

from common import read_arguments
from diffusers import StableDiffusion3Pipeline
from torch import Tensor
from trl import ScriptArguments

from diffusers_adjoint import AdjointMatchingTrainer
from diffusers_adjoint.cli.commands import load_prompts, lora_config
from diffusers_adjoint.rewards import PickScore


@dataclass
class RewardArguments(ScriptArguments):
    """The options of TRL's scripts, and the name or folder of PickScore."""

    reward_model: str = field(default="yuvalkirstain/PickScore_v1", metadata={"help": "CLIPModel of PickScore."})
    reward_processor: str = field(
        default="laion/CLIP-ViT-H-14-laion2B-s32B-b79K", metadata={"help": "Tokenizer and image processor of PickScore."}
    )


def unsaturated(images: Tensor, prompts: list[str]) -> Tensor:
    """Minus the mean excess of pixels beyond [0.05, 0.95], 0 at best: aesthetic rewards tend towards glaring images."""
    return -((0.05 - images).relu() + (images - 0.95).relu()).mean((1, 2, 3))


def main() -> None:
    arguments = read_arguments("multi_reward", RewardArguments)
    script = arguments.script
    pipe = StableDiffusion3Pipeline.from_pretrained(arguments.model.model_name_or_path, **arguments.config.model_init_kwargs)
    pipe.vae.enable_slicing()  # decodes one image at a time, which saves memory in both passes
    trainer = AdjointMatchingTrainer(
        model=pipe,
        reward_funcs=[PickScore(script.reward_model, script.reward_processor), unsaturated],
        args=arguments.config,
        train_dataset=load_prompts(script, script.dataset_train_split),
        eval_dataset=load_prompts(script, script.dataset_test_split),
        peft_config=lora_config(arguments.model),
    )
    trainer.train(resume_from_checkpoint=arguments.resume)
    trainer.save_model()  # with --push_to_hub true, to the Hub too


if __name__ == "__main__":
    main()
