"""A reward without a gradient: the number of holes in a handwritten digit. A zero, a six and a nine have one, an eight has two.

    python examples/black_box.py                        # settings: recipes/black_box.yaml
    python examples/black_box.py --smoke                # two updates and a few images, seconds on a CPU

The pipeline is the one in digits/, small enough to compare the result with the exact target: prints how many images have
a hole and which digits are read, before, after, and in samples of the base weighted by exp(λr). Needs scikit-learn and scipy.

Hardware: needs about 1 GB of memory, on a CPU (measured).
Run so far: the recipe itself, on the pipeline in digits/; the numbers are in docs/black_box.md.

Training alone, from the command line, with the function named by its file:

    diffusers-adjoint train --config examples/recipes/black_box.yaml --reward_funcs examples/black_box.py:holes
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

sys.path += [str(Path(__file__).parent), str(Path(__file__).parent / "digits")]

import numpy as np
import torch
from common import read_arguments
from data import OPEN_PROMPT, WORDS, read_digits
from diffusers import StableDiffusion3Pipeline
from PIL.Image import Image
from scipy.ndimage import label
from torch import Tensor
from trl import ScriptArguments

from diffusers_adjoint import AdjointMatchingTrainer
from diffusers_adjoint.cli.commands import load_prompts, lora_config
from diffusers_adjoint.metrics import TiltReport, tilt_shift

BATCH = 250  # images in one call of the pipeline


@dataclass
class MeasureArguments(ScriptArguments):
    """The options of TRL's scripts, and the number of images that measure the model."""

    measured_images: int = field(default=2000, metadata={"help": "Images of the base, and of the tuned model."})


def holes(images: list[Image], prompts: list[str]) -> list[int]:
    """The number of dark regions in each image that bright strokes enclose.

    A number of NumPy or Python is enough: nothing is differentiated. Other tools for this place are a detector, a text reader, or
    a server that is asked; `reward_workers` asks several questions at once.

    Args:
        images: PIL images, as `images_as: pil` in the recipe asks for.
        prompts: one for each image; unused here.
    """
    dark = [np.asarray(image.convert("L")) < 102 for image in images]  # of 255
    # The frame connects all regions at the border into one, the outside.
    return [label(np.pad(region, 1, constant_values=True))[1] - 1 for region in dark]


def draw(pipe: StableDiffusion3Pipeline, count: int) -> list[Image]:
    """Images from the pipeline's ordinary call, with the same seeds at each call."""
    images: list[Image] = []
    for first in range(0, count, BATCH):
        prompts = [OPEN_PROMPT] * min(BATCH, count - first)
        generator = torch.Generator().manual_seed(20_000 + first)
        images += pipe(prompts, num_inference_steps=20, guidance_scale=1.0, max_sequence_length=1, generator=generator).images
    return images


def report(before: list[Image], after: list[Image], reward_scale: float) -> str:
    """Means and class shares of base and model, and those of the target: the base's images weighted by exp(λr)."""
    counts = [torch.tensor(holes(images, [])).double() for images in (before, after)]
    digits = [read_digits(as_tensor(images)) for images in (before, after)]
    statistics = {"holes": counts, "share with a hole": [(count > 0).double() for count in counts]}
    statistics |= {f"read as {word}": [(digit == i).double() for digit in digits] for i, word in enumerate(WORDS)}
    log_weights = reward_scale * counts[0]
    return TiltReport([tilt_shift(name, "ODE", *pair, log_weights) for name, pair in statistics.items()], None).format()


def as_tensor(images: list[Image]) -> Tensor:
    """Images as a tensor (B, 3, H, W) in [0, 1]."""
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2) / 255


def main() -> None:
    arguments = read_arguments("black_box", MeasureArguments)
    torch.set_num_threads(1)  # on tensors this small, a second thread makes it slower
    pipe = StableDiffusion3Pipeline.from_pretrained(arguments.model.model_name_or_path, **arguments.config.model_init_kwargs)
    pipe.set_progress_bar_config(disable=True)
    trainer = AdjointMatchingTrainer(
        model=pipe,
        reward_funcs=holes,
        args=arguments.config,
        train_dataset=load_prompts(arguments.script, arguments.script.dataset_train_split),
        peft_config=lora_config(arguments.model),
    )
    before = draw(pipe, arguments.script.measured_images)  # a new adapter changes nothing yet
    trainer.train(resume_from_checkpoint=arguments.resume)
    trainer.save_model()
    print(report(before, draw(pipe, arguments.script.measured_images), trainer.reward_scale))


if __name__ == "__main__":
    main()
