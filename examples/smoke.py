"""`--smoke`: the same script on a tiny pipeline of the same class with random weights, two updates, seconds on a CPU.

It shows that the code runs, nothing else. A checkout is needed: the tiny pipelines are those of the tests.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "tests"))

from families import FAMILIES
from tiny_rewards import tiny_clip

from diffusers_adjoint.rewards import PickScore

__all__ = ["TinyPickScore", "smoke_options"]

FAMILY = {
    "sd15": "Stable Diffusion 1.5",
    "sd35_medium": "Stable Diffusion 3",
    "flux1_dev": "FLUX.1",
    "flux2_klein": "FLUX.2-klein",
    "qwen_image": "Qwen-Image",
    "wan_video": "Wan 2.1",
    "own_reward": "Stable Diffusion 1.5",
    "multi_reward": "Stable Diffusion 3",
    "full_finetuning": "Stable Diffusion 1.5",
    "z_image_modular": "Z-Image, modular",
}
OWN_PICK_SCORE = {"wan_video", "multi_reward"}  # these examples make PickScore themselves
SETTINGS = {
    "dtype": "float32",
    "bf16": "false",
    "use_cpu": "true",
    "max_steps": 2,
    "num_inference_steps": 2,
    "num_loss_steps": 1,
    "num_generations": 1,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "eval_steps": 2,
    "logging_steps": 1,
    "num_generations_eval": 1,
    "save_strategy": "no",
    "report_to": "none",
}
# The pipeline of this example is tiny already, so only sizes change.
BLACK_BOX = {"num_generations": 4, "measured_images": 20, "warmup_steps": 0}
FOLDER = tempfile.TemporaryDirectory()  # removed when the script ends


class TinyPickScore(PickScore):
    """PickScore's code with a tiny CLIP of random weights."""

    def __init__(self) -> None:
        folder = tiny_clip(Path(FOLDER.name) / "clip")
        super().__init__(folder, folder)


def smoke_options(name: str) -> list[str]:
    """Options that replace an example's weights and sizes; everything else stays as in its recipe."""
    if name == "black_box":
        return _words(SETTINGS | BLACK_BOX | {"output_dir": "out/smoke/black_box"})
    family = next(family for family in FAMILIES if family.name == FAMILY[name])
    model = Path(FOLDER.name) / name
    family.build().save_pretrained(str(model))  # a modular pipeline accepts no Path
    settings = SETTINGS | {"model_name_or_path": model, "output_dir": f"out/smoke/{name}"}
    settings["pipeline_kwargs"] = json.dumps(family.kwargs)
    if name in OWN_PICK_SCORE:
        clip = tiny_clip(Path(FOLDER.name) / "clip")
        settings |= {"reward_model": clip, "reward_processor": clip}
    elif name != "own_reward":
        settings["reward_funcs"] = f"{Path(__file__)}:TinyPickScore"
    return _words(settings)


def _words(settings: dict[str, object]) -> list[str]:
    return [word for option, value in settings.items() for word in (f"--{option}", str(value))]
