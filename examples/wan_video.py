"""Wan 2.1 (text to video) with PickScore on its frames.

    python examples/wan_video.py                        # settings: recipes/wan_video.yaml
    accelerate launch examples/wan_video.py --max_steps 500
    python examples/wan_video.py --smoke                # a tiny pipeline, two updates, seconds on a CPU

Hardware: needs about 48 GB of GPU memory (estimate).
Run so far: --smoke. Not run on the published weights: no GPU, no Hub here; the settings are untuned.

Rewards see videos as (B, F, 3, H, W). One for images is applied to some frames and averaged; what moves between them is
then not rewarded, and is kept only as far as the KL to the base keeps it: a reward for motion or consistency would be a
second entry of `reward_funcs`.
"""

from dataclasses import dataclass, field

import torch
from common import read_arguments
from diffusers import WanPipeline
from trl import ScriptArguments

from diffusers_adjoint import AdjointMatchingTrainer
from diffusers_adjoint.cli.commands import load_prompts, lora_config
from diffusers_adjoint.rewards import PickScore, per_frame


@dataclass
class VideoArguments(ScriptArguments):
    """The options of TRL's scripts, and the name or folder of PickScore."""

    reward_model: str = field(default="yuvalkirstain/PickScore_v1", metadata={"help": "CLIPModel of PickScore."})
    reward_processor: str = field(
        default="laion/CLIP-ViT-H-14-laion2B-s32B-b79K", metadata={"help": "Tokenizer and image processor of PickScore."}
    )
    frames_scored: int = field(default=4, metadata={"help": "Frames that the reward sees, evenly spread."})


def main() -> None:
    arguments = read_arguments("wan_video", VideoArguments)
    script, settings = arguments.script, arguments.config.model_init_kwargs
    dtype = {"default": settings["dtype"], "vae": torch.float32}  # Wan's autoencoder is made for single precision
    pipe = WanPipeline.from_pretrained(arguments.model.model_name_or_path, **settings | {"dtype": dtype})
    pipe.vae.enable_tiling()  # large frames go through the decoder in overlapping tiles
    trainer = AdjointMatchingTrainer(
        model=pipe,
        reward_funcs=per_frame(PickScore(script.reward_model, script.reward_processor), script.frames_scored),
        args=arguments.config,
        train_dataset=load_prompts(script, script.dataset_train_split),
        peft_config=lora_config(arguments.model),
    )
    trainer.train(resume_from_checkpoint=arguments.resume)
    trainer.save_model()  # with --push_to_hub true, to the Hub too


if __name__ == "__main__":
    main()
