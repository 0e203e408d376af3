"""The arguments of the pipeline's `__call__`: those that the replay sets, those that a user may set, and guidance scales."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["CallArguments"]

# Arguments that the replay sets or excludes → what a user can do instead, for messages.
_RESERVED = {
    "guidance_scale": "use the option guidance_scale",
    "num_inference_steps": "use the option num_inference_steps",
    "num_images_per_prompt": "use the option num_generations",
    "num_videos_per_prompt": "use the option num_generations",
    "num_waveforms_per_prompt": "use the option num_generations",
    "batch_size": "use the option per_device_train_batch_size",
    "generator": "use the option seed",
    "latents": "use the option seed",
    "audio_latents": "use the option seed",
    "initial_audio_waveforms": "remove it, the start is noise",
    "denoising_start": "use strength, which starts from the image with noise of the right size",
    "callback": "remove it, no callback runs within a prediction",
    "callback_on_step_end": "remove it, no callback runs within a prediction",
    "output_type": "remove it, images are always tensors",
    "return_dict": "remove it, images are always tensors",
}
# Scales of further kinds of guidance. _NONE has those that are switched off by a value other than `no_guidance`.
_OF_SOUND = ("audio_guidance_scale", "audio_stg_scale", "audio_modality_scale")
_FURTHER = ("guidance_scale_2", "pag_scale", "stg_scale", "modality_scale", *_OF_SOUND)
_NONE = {"pag_scale": 0.0, "stg_scale": 0.0, "audio_stg_scale": 0.0}
# Arguments whose list is one value for all samples, although the annotation is that of a list with a value for each.
_GRID = ("sigmas", "timesteps")
# An annotation with one of these words, in lower case, is of an argument that takes a value for each sample. "str" is among
# them because pipelines take lists of texts even if the annotation is just `str`.
_PER_SAMPLE = ("list[", "tensor", "image", "str")


class CallArguments:
    """Makes the arguments of a pipeline's call from options, `pipeline_kwargs` and dataset columns.

    Args:
        pipeline: the pipeline's name, for messages.
        call: its `__call__`.
        num_inference_steps, guidance_scale, pipeline_kwargs: as in `PipelineReplay`.
        guidance_embedded: whether `guidance_scale` is an input of the (distilled) network, a condition rather than guidance.
        no_guidance: value of a guidance scale that switches guidance off; 0 for pipelines that guide by 1 + scale, else 1.

    Attributes:
        pipeline: the pipeline's name.
        guides: whether a guidance scale is on, so that guided and unguided calls differ.
        takes_prompt: whether the pipeline has an argument `prompt`.

    Raises:
        ValueError: if `pipeline_kwargs` contains `prompt`, or an argument that the pipeline does not take or that the replay sets
            itself; or if `guidance_scale` is not 1 and the pipeline takes no such scale.
    """

    def __init__(
        self,
        pipeline: str,
        call: Callable[..., Any],
        num_inference_steps: int,
        guidance_scale: float,
        pipeline_kwargs: Mapping[str, Any],
        *,
        guidance_embedded: bool,
        no_guidance: float,
    ) -> None:
        self.pipeline = pipeline
        self._parameters = inspect.signature(call).parameters
        self._no_guidance = no_guidance
        self.takes_prompt = "prompt" in self._parameters
        true_cfg = "true_cfg_scale" in self._parameters
        if true_cfg and not guidance_embedded:
            self._scale = "true_cfg_scale"
        else:  # where guidance rises from frame to frame, only its maximum is set; there is no guidance_scale
            self._scale = "max_guidance_scale" if "max_guidance_scale" in self._parameters else "guidance_scale"
        if true_cfg:  # a pipeline with both uses guidance_scale as an embedding only
            self._guidance = ["true_cfg_scale", *_FURTHER]
        else:
            self._guidance = list(_FURTHER) if guidance_embedded else [self._scale, *_FURTHER]
        self._check(pipeline_kwargs, guidance_scale)
        if guidance_scale == 1 and not (guidance_embedded and self._scale == "guidance_scale"):
            guidance_scale = no_guidance
        self._shared = dict(pipeline_kwargs)
        self._ours: dict[str, Any] = {"num_inference_steps": num_inference_steps, "output_type": "pt", "return_dict": False}
        if self._scale in self._parameters:
            self._ours[self._scale] = guidance_scale
        options = {**self._shared, **self._ours}
        self.guides = any(self._scale_in(options, name) != none for name, none in self._off(options).items())

    def __call__(self, columns: Mapping[str, list[Any]], batch_size: int, *, guided: bool = True) -> dict[str, Any]:
        """All arguments of a call for B samples, without the generators.

        Args:
            columns: name of a column → B values. Columns that the pipeline does not take are ignored; they are for the rewards.
            batch_size: B.
            guided: if False, every guidance scale is switched off, except one that is an input of the network.

        Returns:
            Name of an argument → value; a tensor column is stacked to shape (B, …).

        Raises:
            ValueError: if a required column is missing; if a column does not have B values, sets an argument that the replay sets
                itself, or sets one that the pipeline takes once for all samples; or if the pipeline's `true_cfg_scale` is above 1
                without a negative prompt.
        """
        taken = self.taken(columns)
        for name, values in taken.items():
            self._check_column(name, values, batch_size)
        # A text of pipeline_kwargs goes with every prompt: pipelines want a list of texts if the prompts are a list.
        shared = {
            name: _stacked([value] * batch_size) if isinstance(value, str) and "list[str]" in self._annotation(name) else value
            for name, value in self._shared.items()
        }
        arguments = {**shared, **self._ours, **{name: _stacked(values) for name, values in taken.items()}}
        self._check_complete(arguments, columns)
        if "batch_size" in self._parameters and not self.takes_prompt:
            arguments["batch_size"] = batch_size
        return arguments if guided else self._unguided(arguments)

    def taken(self, columns: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        """The columns that are arguments of the pipeline.

        If there is a column `NAME_embeds`, the column `NAME` is left out: the rewards get the text, the pipeline its embeddings.
        """
        names = [name for name in columns if name in self._parameters and f"{name}_embeds" not in columns]
        return {name: columns[name] for name in names}

    def require_known(self, columns: Mapping[str, Any], used: set[str]) -> None:
        """Check that no column looks like a misspelt argument of the pipeline.

        Args:
            columns: the dataset's columns, by name.
            used: names of the columns that a reward takes.

        Raises:
            ValueError: for an unused column whose name is close to that of an argument.
        """
        for name in columns.keys() - self._parameters.keys() - used:
            if close := difflib.get_close_matches(name, self._parameters, 1, cutoff=0.85):
                raise ValueError(
                    f"column {name!r} is neither an argument of {self.pipeline} nor of a reward; rename it to {close[0]!r} if "
                    f"that is meant, or remove it."
                )

    def _check(self, pipeline_kwargs: Mapping[str, Any], guidance_scale: float) -> None:
        for name in pipeline_kwargs:
            if name in _RESERVED or name == self._scale:
                instead = _RESERVED.get(name, "use the option guidance_scale")
                raise ValueError(f"pipeline_kwargs contains {name!r}, which is not set there; {instead}.")
            if name == "prompt":
                raise ValueError("pipeline_kwargs contains 'prompt'; pass prompts as the dataset's 'prompt' column.")
            if name not in self._parameters:
                close = difflib.get_close_matches(name, self._parameters, 1)
                hint = f"take {close[0]!r} if that is meant." if close else "remove it."
                raise ValueError(f"pipeline_kwargs contains {name!r}, which {self.pipeline} does not take; {hint}")
        if guidance_scale != 1 and self._scale not in self._parameters:
            raise ValueError(f"{self.pipeline} takes no guidance_scale, but {guidance_scale} was asked for; leave it at 1.")

    def _check_column(self, name: str, values: list[Any], batch_size: int) -> None:
        if name in _RESERVED:
            raise ValueError(f"column {name!r} would set an argument that the replay sets itself; rename the column.")
        if not self._per_sample(name):
            raise ValueError(
                f"column {name!r} would set an argument that {self.pipeline} takes once for all samples; put it into "
                f"pipeline_kwargs, or remove or rename the column."
            )
        if len(values) != batch_size:
            raise ValueError(f"column {name!r} has {len(values)} values for {batch_size} generators; pass one for each sample.")

    def _check_complete(self, arguments: Mapping[str, Any], columns: Mapping[str, Any]) -> None:
        if self.takes_prompt and not {"prompt", "prompt_embeds"} & arguments.keys():
            raise ValueError(f"{self.pipeline} needs prompts, but the columns are {sorted(columns)}; add a 'prompt' column.")
        for name, parameter in self._parameters.items():
            required = parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
            if required and name not in arguments and name not in ("self", "prompt"):
                raise ValueError(
                    f"{self.pipeline} needs {name!r}, but the columns are {sorted(columns)}; add a column of that name."
                )
        negative = {"negative_prompt", "negative_prompt_embeds"} & self._parameters.keys()
        if negative and arguments.get("true_cfg_scale", 1) > 1 and not negative & arguments.keys():
            raise ValueError(
                f"{self.pipeline} guides only against a negative prompt, and there is none; add a 'negative_prompt' column or "
                f"pipeline_kwargs={{'negative_prompt': ' '}}, or set guidance to 1."
            )

    def _per_sample(self, name: str) -> bool:
        annotation = self._annotation(name)
        if name in _GRID or "dict[" in annotation:
            return False
        return not annotation or any(word in annotation for word in _PER_SAMPLE)

    def _annotation(self, name: str) -> str:
        annotation = self._parameters[name].annotation
        return "" if annotation is inspect.Parameter.empty else inspect.formatannotation(annotation).lower()

    def _unguided(self, arguments: dict[str, Any]) -> dict[str, Any]:
        return {**arguments, **self._off(arguments)}

    def _off(self, arguments: Mapping[str, Any]) -> dict[str, float]:
        """Name of each guidance scale of a call → the value that switches it off.

        A scale that is `None` is left out: the pipeline then uses the value of another one.
        """
        names = [name for name in self._guidance if name in self._parameters]
        return {name: _NONE.get(name, self._no_guidance) for name in names if self._scale_in(arguments, name) is not None}

    def _scale_in(self, arguments: Mapping[str, Any], name: str) -> Any:
        return arguments.get(name, self._parameters[name].default)


def _stacked(values: list[Any]) -> Any:
    """Put the samples' values into the form that a pipeline takes.

    Tensors (precomputed embeddings, images of one size) are stacked. Other values are a list. The value of a single sample is
    passed without a list, because some pipelines take only one text, one image, or one list of images. A number is always passed
    in a list, because pipelines take class labels as a list.
    """
    if all(isinstance(value, Tensor) for value in values):
        return torch.stack(values)
    return values[0] if len(values) == 1 and not isinstance(values[0], int | float) else values
