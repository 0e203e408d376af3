"""Call a modular pipeline: its blocks as one function that can be stopped before its loop, and replayed from there.

A `ModularPipeline` chooses blocks by its inputs and runs them one after the other on a state. One of these blocks loops over
the timesteps. The blocks before it prepare, and those after it decode.
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

LATENTS = "latents"  # name of x in the state of the blocks, from the block that draws it to the block that decodes it
SCALE = "guidance_scale"


class ModularCall:
    """The call of a modular pipeline; it corresponds to `PlainCall` for other pipelines.

    A modular pipeline guides by components, the guiders, and its call has no argument for the scale. Here the argument
    `guidance_scale` sets the scale of the "guider", "guidance_scale_2" that of "guider_2", and "audio_guidance_scale" that of
    "audio_guider". A guider whose own argument is missing takes `guidance_scale`.

    A scale of 1 disables the guider for the loop, including any other comparison that it makes. The blocks before the loop still
    see the guider as the pipeline has it, because some fail without guidance. Any other scale enables the guider for all blocks.
    The pipeline's own guiders are not modified.

    Args:
        pipeline: the pipeline; it is not modified.

    Attributes:
        source, insists_on_safety_checker, exchanges_processors, loggers, outputs, randn_tensor: as in `PlainCall`.

    Raises:
        ValueError: if no block calls `scheduler.step`.
    """

    source = "prepare_latents"
    insists_on_safety_checker = False
    exchanges_processors = False
    randn_tensor: Any = None

    def __init__(self, pipeline: ModularPipeline) -> None:
        self._name = type(pipeline).__name__
        self._blocks = pipeline.blocks  # diffusers returns a copy, so changing it leaves the pipeline as it is
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
        self._chosen_for: dict[frozenset[str], list[ModularPipelineBlocks]] = {}  # blocks are chosen by which inputs are given
        self.outputs = tuple(made.name for made in self._blocks.intermediate_outputs)
        modules = {type(block).__module__ for block in _all_blocks(self._blocks)}
        self.loggers = [logging.getLogger(name) for name in sorted(modules)]

    def view_class(self, pipeline_class: type[Any]) -> type[Any]:
        return type(pipeline_class.__name__, (_ModularView, pipeline_class), {})

    def undisturbed(self, view: Any, **arguments: Any) -> Media:
        """Run the pipeline's own call; only `enter_loop` of the view is added before its loop."""
        inputs = self._inputs(view, arguments)
        view.__dict__["_blocks"] = self._hooked
        images, audio = self.output(inputs), AUDIO if AUDIO in self.outputs else None
        made = type(view).__call__(view, output=[name for name in (images, audio) if name], **inputs)
        return Media(made[images], made.get(AUDIO))

    def __call__(self, view: Any, randn_tensor: None = None, **arguments: Any) -> Media:
        """Run the same blocks without `torch.no_grad`; those before the loop run in `prepare_state`, which can be replayed."""
        inputs = self._inputs(view, arguments)
        chosen = self._chosen(inputs)
        start = next(index for index, block in enumerate(chosen) if _steps(block))
        blocks = [_replayable(block) for block in chosen]
        state = PipelineState(*view.prepare_state(self._blocks, blocks[:start], inputs))
        grid = view.scheduler.timesteps
        for name, value in state.values.items():
            if isinstance(value, ReplayedTimesteps):  # the recorded grid, without its first steps if an image is given
                state.values[name] = grid[len(grid) - len(value) :]
            elif isinstance(value, StandIn):  # a copy that a block made of the scheduler, for a second latent
                state.values[name] = copy.deepcopy(view.scheduler)
        state.values.update({name: inputs[name] for name in ("generator",) if name in inputs})
        view.enter_loop(state)
        for block in blocks[start:]:
            _, state = block(view, state)
        return Media(state.get(self.output(inputs)), state.get(AUDIO) if AUDIO in self.outputs else None)

    def inputs(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments that the pipeline's own call accepts."""
        return {name: value for name, value in arguments.items() if name in self._taken}

    def scales(self, arguments: Mapping[str, Any]) -> dict[str, float]:
        """Name of a guider → its scale by these arguments; 1 disables it."""
        scales = {}
        for name, option in self._scale_of.items():
            scale = 1.0 if option is None else arguments.get(option)
            scales[name] = arguments.get(SCALE, 1.0) if scale is None else scale
        return scales

    def output(self, arguments: Mapping[str, Any]) -> str:
        """Name of the images in the state: the first output after the loop, from the last block, that is not sound or latents."""
        blocks = self._chosen(self.inputs(arguments))
        start = next(index for index, block in enumerate(blocks) if _steps(block))
        made = [made.name for block in reversed(blocks[start + 1 :]) for made in block.intermediate_outputs]
        return next((name for name in made if name != AUDIO and not name.endswith(LATENTS)), made[0])

    def _inputs(self, view: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Set the guiders of the view to the scales among the arguments, and return the arguments that the blocks accept."""
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
        """Names of the components that the blocks for these arguments expect and the pipeline has not loaded."""
        blocks = self._chosen(self.inputs(arguments))
        named = {component.name for block in blocks for component in block.expected_components}
        return [name for name in pipeline.null_component_names if name in named]

    def _chosen(self, inputs: Mapping[str, Any]) -> list[ModularPipelineBlocks]:
        """The blocks that run for these inputs, in order; a block that loops counts as one.

        Raises:
            ValueError: if a required input is missing, if the number of blocks that loop is not 1, or if the last block loops.
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
    """Mixin for the view's class: the parts of the call that are recorded and replayed, as methods like other pipelines have."""

    _guiders_off: list[BaseGuidance]

    def prepare_state(
        self, whole: ModularPipelineBlocks, blocks: list[ModularPipelineBlocks], inputs: Mapping[str, Any]
    ) -> tuple[dict[str, Any], dict[str, list[str]]]:
        """Run the blocks before the loop.

        Args:
            whole: all blocks of the pipeline.
            blocks: the blocks before the loop.
            inputs: the inputs of the call.

        Returns:
            The values of the state before the loop, by name; and for each group of inputs, the names in it.
        """
        start = copy.copy(self)
        start.__dict__["_blocks"] = _Nothing(whole)
        state = type(self).__call__(start, **inputs)
        for block in blocks:
            _, state = block(self, state)
        return state.values, state.kwargs_mapping

    def prepare_latents(self, latents: Any) -> Any:
        """Return the initial latents unchanged; recording and replay replace this method."""
        return latents

    def prepare_further(self, latents: Any) -> Any:
        """The same for other latents of the state, which a second scheduler may step."""
        return latents

    def enter_loop(self, state: PipelineState) -> None:
        """Called right before the block that loops: disables the guiders with scale 1, and calls the prepare_… methods.

        Raises:
            ValueError: if the state has no latents yet.
        """
        if state.values.get(LATENTS) is None:
            raise ValueError(
                f"{type(self).__name__} has no latents before the block that steps its scheduler, as where a video is made "
                f"segment by segment and each one draws its own; pass a pipeline whose latents are all drawn before its loop."
            )
        for guider in self._guiders_off:
            guider.disable()
            if SCALE in guider.config:  # some blocks enable it again, so its scale is set to no guidance too
                guider.guidance_scale = 0.0 if guider.config.get("use_original_formulation") else 1.0
        state.values[LATENTS] = self.prepare_latents(state.values[LATENTS])
        for name, value in state.values.items():
            if name.endswith("_" + LATENTS):
                state.values[name] = self.prepare_further(value)


class _Nothing:
    """Replaces a pipeline's blocks by none, so that its call returns the initial state."""

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
    """Whether a block that counts as one, or a part of its loop, calls `scheduler.step`."""
    if not _is_leaf(block):
        return False
    calls = [inspect.unwrap(type(part).__call__) for part in _all_blocks(block)]
    return any({"scheduler", "step"} <= set(call.__code__.co_names) for call in calls)


def _hooked(blocks: ModularPipelineBlocks) -> ModularPipelineBlocks:
    """A copy in which the block that loops calls `enter_loop` of the pipeline first."""
    blocks = copy.deepcopy(blocks)
    every = {id(block): block for block in _all_blocks(blocks)}  # workflows share blocks, so each is taken once
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
    """A copy of a block and its parts without `torch.no_grad`, whose loop visits only the chosen steps (see `replayable`)."""
    rebuilt = copy.copy(block)
    rebuilt.__class__ = _replayable_class(cast(Any, type(block)))
    rebuilt.sub_blocks = type(block.sub_blocks)({name: _replayable(part) for name, part in block.sub_blocks.items()})
    return rebuilt


@functools.cache
def _replayable_class(cls: Any) -> Any:
    def set_block_state(self: Any, state: PipelineState, block_state: Any) -> None:
        """A loop without a step does not compute all of the block's outputs; the missing ones keep their value in the state."""
        for name in self.intermediate_output_names:
            if name not in vars(block_state):
                block_state[name] = state.get(name)
        cls.set_block_state(self, state, block_state)

    members = {"__call__": replayable(cls.__call__), "set_block_state": set_block_state, "__module__": cls.__module__}
    return type(cls.__name__, (cls,), members)


def _guiders(pipeline: ModularPipeline) -> dict[str, BaseGuidance]:
    return {name: part for name, part in pipeline.components.items() if isinstance(part, BaseGuidance)}


def _scale_of(name: str, guider: BaseGuidance) -> str | None:
    """Name of the argument that sets this guider's scale; `None` if it has no scale, or a name without "guider"."""
    if not {"guider"} & set(name.split("_")) or SCALE not in guider.config:
        return None
    return name.replace("guider", SCALE)


def _signature(blocks: ModularPipelineBlocks, scales: list[str]) -> inspect.Signature:
    """The signature of the pipeline's call, like the signature of `__call__` of other pipelines.

    A group of inputs is one parameter, a dict. Every parameter has a default, because which inputs are required depends on the
    blocks, and these on the other inputs.
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
