"""A modular pipeline's blocks as one call, which can be stopped before its loop, let into it at one step, and go on after it.

A `ModularPipeline` has no code of its own: blocks, which it chooses by its inputs, run one after the other on a state. One of
them loops over the timesteps, and the blocks before it are preparation.
"""

from __future__ import annotations

import copy
import functools
import inspect
import logging
from collections.abc import Iterator, Mapping
from typing import Any, cast

from diffusers import BaseGuidance, LoopSequentialPipelineBlocks, ModularPipeline, ModularPipelineBlocks
from diffusers.modular_pipelines import PipelineState

from .plain import AUDIO, Media
from .stand_in import ReplayedTimesteps, StandIn, replayable

__all__ = ["ModularCall"]

LATENTS = "latents"  # as blocks call the state, from the one that draws it to the one that decodes it
SCALE = "guidance_scale"


class ModularCall:
    """The call of a modular pipeline; what `PlainCall` is for the others.

    Guidance is the affair of components there, the guiders, and no argument of the call. Here `guidance_scale` sets the guider
    ("guidance_scale_2" that of the name "guider_2", "audio_guidance_scale" the "audio_guider"; without them `guidance_scale` is
    that of all). 1 switches it off for the loop, whatever else it compares; the blocks before the loop see it as the pipeline has
    it, since some fail where nothing is going to be compared. Any other scale switches it on for all of them. The pipeline's own
    guiders stay as they are.

    Args:
        pipeline: never written to.

    Attributes:
        source, insists_on_safety_checker, exchanges_processors, loggers, outputs, randn_tensor: as in `PlainCall`.

    Raises:
        ValueError: if no block hands anything to `scheduler.step`.
    """

    source = "prepare_latents"
    insists_on_safety_checker = False
    exchanges_processors = False
    randn_tensor: Any = None

    def __init__(self, pipeline: ModularPipeline) -> None:
        self._name = type(pipeline).__name__
        self._blocks = pipeline.blocks  # a copy
        for block in _all_blocks(self._blocks):
            if isinstance(block, LoopSequentialPipelineBlocks):
                block.set_progress_bar_config(disable=True)
        if not any(_steps(block) for block in _all_blocks(self._blocks)):
            raise ValueError(
                f"no block of {self._name} calls scheduler.step; pass a pipeline whose blocks draw, loop and decode."
            )
        self._hooked = _hooked(self._blocks)
        self._scale_of = {name: _scale_of(name, guider) for name, guider in _guiders(pipeline).items()}
        self.__signature__ = _signature(self._blocks, [scale for scale in self._scale_of.values() if scale is not None])
        self._taken = frozenset(given.name or given.kwargs_type for given in self._blocks.inputs)
        self._chosen_for: dict[frozenset[str], list[ModularPipelineBlocks]] = {}  # blocks choose by what is there
        self.outputs = tuple(made.name for made in self._blocks.intermediate_outputs)
        modules = {type(block).__module__ for block in _all_blocks(self._blocks)}
        self.loggers = [logging.getLogger(name) for name in sorted(modules)]

    def view_class(self, pipeline_class: type[Any]) -> type[Any]:
        return type(pipeline_class.__name__, (_ModularView, pipeline_class), {})

    def undisturbed(self, view: Any, **arguments: Any) -> Media:
        """The pipeline's own call, of which the view learns when the loop starts."""
        inputs = self._inputs(view, arguments)
        view.__dict__["_blocks"] = self._hooked
        images, audio = self.output(inputs), AUDIO if AUDIO in self.outputs else None
        made = type(view).__call__(view, output=[name for name in (images, audio) if name], **inputs)
        return Media(made[images], made.get(AUDIO))

    def __call__(self, view: Any, randn_tensor: None = None, **arguments: Any) -> Media:
        """The same blocks, out of `torch.no_grad`, from the first to the last."""
        inputs = self._inputs(view, arguments)
        chosen = self._chosen(inputs)
        start = next(index for index, block in enumerate(chosen) if _steps(block))
        blocks = [_replayable(block) for block in chosen]
        state = PipelineState(*view.prepare_state(self._blocks, blocks[:start], inputs))
        grid = view.scheduler.timesteps
        for name, value in state.values.items():
            if isinstance(value, ReplayedTimesteps):  # of the grid that was recorded, cut at its start where an image is given
                state.values[name] = grid[len(grid) - len(value) :]
            elif isinstance(value, StandIn):  # a copy that a block made to step a second latent
                state.values[name] = copy.deepcopy(view.scheduler)
        state.values.update({name: inputs[name] for name in ("generator",) if name in inputs})
        view.enter_loop(state)
        for block in blocks[start:]:
            _, state = block(view, state)
        return Media(state.get(self.output(inputs)), state.get(AUDIO) if AUDIO in self.outputs else None)

    def inputs(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Those of the arguments that the pipeline's own call takes."""
        return {name: value for name, value in arguments.items() if name in self._taken}

    def scales(self, arguments: Mapping[str, Any]) -> dict[str, float]:
        """Name of a guider → the scale that the arguments set it to, 1 for off."""
        scales = {}
        for name, option in self._scale_of.items():
            scale = 1.0 if option is None else arguments.get(option)
            scales[name] = arguments.get(SCALE, 1.0) if scale is None else scale
        return scales

    def output(self, arguments: Mapping[str, Any]) -> str:
        """Name of the images in the state: the first that the last block makes, but for their sound."""
        blocks = self._chosen(self.inputs(arguments))
        start = next(index for index, block in enumerate(blocks) if _steps(block))
        made = [made.name for block in reversed(blocks[start + 1 :]) for made in block.intermediate_outputs]
        return next((name for name in made if name != AUDIO and not name.endswith(LATENTS)), made[0])

    def _inputs(self, view: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments that blocks take, after the guiders of the view are set to the scales among them."""
        off = []
        for name, scale in self.scales(arguments).items():
            guider = view.__dict__[name] = copy.copy(getattr(view, name))
            if scale == 1:
                off.append(guider)
            else:
                guider.enable()
                guider.guidance_scale = scale
        view.__dict__["_guiders_off"] = off
        return self.inputs(arguments)

    def not_loaded(self, pipeline: ModularPipeline, arguments: Mapping[str, Any]) -> list[str]:
        """Names of the components that the blocks for these arguments name and the pipeline does not have."""
        blocks = self._chosen(self.inputs(arguments))
        named = {component.name for block in blocks for component in block.expected_components}
        return [name for name in pipeline.null_component_names if name in named]

    def _chosen(self, inputs: Mapping[str, Any]) -> list[ModularPipelineBlocks]:
        """The blocks that run for these inputs, in their order; one that loops is not taken apart.

        Raises:
            ValueError: if an input is missing, or none of them loops.
        """
        given = {name: value for name, value in inputs.items() if value is not None}
        if frozenset(given) not in self._chosen_for:
            self._chosen_for[frozenset(given)] = self._choose(given)
        return self._chosen_for[frozenset(given)]

    def _choose(self, given: Mapping[str, Any]) -> list[ModularPipelineBlocks]:
        blocks = self._blocks if _is_leaf(self._blocks) else self._blocks.get_execution_blocks(**given)
        missing = [needed.name for needed in blocks.inputs if needed.required and needed.name not in given]
        if missing:
            raise ValueError(
                f"{self._name} needs {', '.join(missing)} for the blocks that {_names(given)} choose; add a column, or an "
                f"entry in pipeline_kwargs."
            )
        leaves = [blocks] if _is_leaf(blocks) else list(blocks.sub_blocks.values())
        at = [index for index, block in enumerate(leaves) if _steps(block)]
        if len(at) != 1 or at[0] == len(leaves) - 1:
            raise ValueError(
                f"{self._name} runs {len(at)} blocks that loop over the scheduler's steps for the inputs {_names(given)}; give "
                f"it the inputs of a workflow that has one such block, and a decoder after it."
            )
        return leaves


class _ModularView:
    """The two places of the call that are recorded and replayed, as methods like those of other pipelines."""

    _guiders_off: list[BaseGuidance]

    def prepare_state(
        self, whole: ModularPipelineBlocks, blocks: list[ModularPipelineBlocks], inputs: Mapping[str, Any]
    ) -> tuple[dict[str, Any], dict[str, list[str]]]:
        """What the state holds before the loop, and the names in each of its groups.

        Args:
            whole: all blocks of the pipeline.
            blocks: those that run before the loop.
        """
        start = copy.copy(self)
        start.__dict__["_blocks"] = _Nothing(whole)
        state = type(self).__call__(start, **inputs)
        for block in blocks:
            _, state = block(self, state)
        return state.values, state.kwargs_mapping

    def prepare_latents(self, latents: Any) -> Any:
        """The latents with which the loop starts."""
        return latents

    def prepare_further(self, latents: Any) -> Any:
        """Other latents of the state; a second scheduler may step them."""
        return latents

    def enter_loop(self, state: PipelineState) -> None:
        """What comes between the blocks before the loop and the one that loops.

        Raises:
            ValueError: if there are no latents yet.
        """
        if state.values.get(LATENTS) is None:
            raise ValueError(
                f"{type(self).__name__} has no latents before the block that steps its scheduler, as where a video is made "
                f"segment by segment and each one draws its own; pass a pipeline whose latents are all drawn before its loop."
            )
        for guider in self._guiders_off:
            guider.disable()
            if SCALE in guider.config:  # some blocks switch it on again, so the scale is one of no guidance as well
                guider.guidance_scale = 0.0 if guider.config.get("use_original_formulation") else 1.0
        state.values[LATENTS] = self.prepare_latents(state.values[LATENTS])
        for name, value in state.values.items():
            if name.endswith("_" + LATENTS):
                state.values[name] = self.prepare_further(value)


class _Nothing:
    """In place of a pipeline's blocks: what is left of its call is the state that they start from."""

    def __init__(self, blocks: ModularPipelineBlocks) -> None:
        self.inputs = blocks.inputs

    def __call__(self, pipeline: Any, state: PipelineState) -> tuple[Any, PipelineState]:
        return pipeline, state


def _is_leaf(block: ModularPipelineBlocks) -> bool:
    return isinstance(block, LoopSequentialPipelineBlocks) or not block.sub_blocks


def _all_blocks(block: ModularPipelineBlocks) -> Iterator[ModularPipelineBlocks]:
    yield block
    for part in block.sub_blocks.values():
        yield from _all_blocks(part)


def _steps(block: ModularPipelineBlocks) -> bool:
    """Whether a block, or a part of its loop, hands something to `scheduler.step`."""
    if not _is_leaf(block):
        return False
    calls = [inspect.unwrap(type(part).__call__) for part in _all_blocks(block)]
    return any({"scheduler", "step"} <= set(call.__code__.co_names) for call in calls)


def _hooked(blocks: ModularPipelineBlocks) -> ModularPipelineBlocks:
    """A copy in which the block that loops tells the pipeline so first."""
    blocks = copy.deepcopy(blocks)
    every = {id(block): block for block in _all_blocks(blocks)}  # workflows share blocks
    inside = {id(part) for block in every.values() if _is_leaf(block) for part in block.sub_blocks.values()}
    for number, block in every.items():
        if _steps(block) and number not in inside:
            block.__class__ = _hooked_class(cast(Any, type(block)))
    return blocks


@functools.cache
def _hooked_class(cls: Any) -> Any:
    def call(self: Any, pipeline: Any, state: PipelineState) -> Any:
        pipeline.enter_loop(state)
        return cls.__call__(self, pipeline, state)

    return type(cls.__name__, (cls,), {"__call__": call, "__module__": cls.__module__})


def _replayable(block: ModularPipelineBlocks) -> ModularPipelineBlocks:
    """A copy of a block out of `torch.no_grad`, with its parts, whose loop goes where it is sent."""
    rebuilt = copy.copy(block)
    rebuilt.__class__ = _replayable_class(cast(Any, type(block)))
    rebuilt.sub_blocks = type(block.sub_blocks)({name: _replayable(part) for name, part in block.sub_blocks.items()})
    return rebuilt


@functools.cache
def _replayable_class(cls: Any) -> Any:
    def set_block_state(self: Any, state: PipelineState, block_state: Any) -> None:
        """A loop that no step is taken of lacks what a step makes: that stays as it is."""
        for name in self.intermediate_output_names:
            if name not in vars(block_state):
                block_state[name] = state.get(name)
        cls.set_block_state(self, state, block_state)

    members = {"__call__": replayable(cls.__call__), "set_block_state": set_block_state, "__module__": cls.__module__}
    return type(cls.__name__, (cls,), members)


def _guiders(pipeline: ModularPipeline) -> dict[str, BaseGuidance]:
    return {name: part for name, part in pipeline.components.items() if isinstance(part, BaseGuidance)}


def _scale_of(name: str, guider: BaseGuidance) -> str | None:
    """The argument that stands for the scale of this guider; `None` if it has no scale or another name."""
    if not {"guider"} & set(name.split("_")) or SCALE not in guider.config:
        return None
    return name.replace("guider", SCALE)


def _signature(blocks: ModularPipelineBlocks, scales: list[str]) -> inspect.Signature:
    """What the pipeline can be called with, as other pipelines say it in the signature of their `__call__`.

    A group of inputs has one entry, a dict. Which inputs are needed depends on the blocks that the others choose: none is here.
    """
    parameters: dict[str, inspect.Parameter] = {}
    for given in blocks.inputs:
        name = given.name or given.kwargs_type
        annotation: Any = dict[str, Any] if given.name is None else given.type_hint
        parameters[name] = _parameter(name, given.default, annotation)
    for name in scales:
        parameters[name] = _parameter(name, 1.0 if name == SCALE else None, float)
    return inspect.Signature(list(parameters.values()))


def _parameter(name: str, default: Any, annotation: Any) -> inspect.Parameter:
    annotation = inspect.Parameter.empty if annotation is None else annotation
    return inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default, annotation=annotation)


def _names(given: Mapping[str, Any]) -> str:
    return ", ".join(sorted(given)) or "(none)"
