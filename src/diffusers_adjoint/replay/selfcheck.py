"""A check at the start of training that the replay computes the same function as the pipeline.

Replay relies on conventions that nearly all pipelines follow but none documents. This module tests each of them against the
pipeline's own call, on a small batch and with about 30 predictions. A pipeline that breaks a convention is refused, because it
would be trained wrongly.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor
from transformers.utils import logging

from .conditioning import copied
from .explain import ONE_SAMPLE, errors_explained, refusal, said
from .pipeline import PipelineReplay
from .plain import Media
from .quantised import quantisation_of
from .stand_in import RecordedStep
from .tiling import noting_tiles, warn_of_tiles
from .view import counting_rows, scaling_rows

__all__ = ["check_replay"]

logger = logging.get_logger(__name__)

_DIRECTIONS = 3
# Largest relative error of the derivative, and the sizes of the finite difference relative to ‖x‖, of which one must agree.
# Correct tiny networks reach 1e-4 in float32. They reach 9e-3 if attention rounds internally, which needs a large difference;
# routed experts need a small one, because their routing changes with x. In bfloat16 every activation is rounded and correct
# networks reach only 1e-1, so there the check detects nothing but a gradient that is missing altogether.
_FINE, _COARSE = (1e-2, (3e-2, 3e-3, 1e-1)), (1e-1, (1e-1, 3e-1))
_OTHER_KERNELS = "take other attention kernels (set_attention_backend('native')) or train on another device"
# Largest relative change of a prediction when gradients are recorded; another attention kernel may then change the rounding.
_SAME_FINE, _SAME_COARSE = 1e-4, 3e-2
# Smallest relative change of a prediction if it depends on an evaluation that is doubled; rounding changes it by less.
_ACTS_FINE, _ACTS_COARSE = 1e-3, 5e-2
_RANGE = 0.02  # how far below 0 rounding may take a pixel


def check_replay(
    replay: PipelineReplay,
    columns: dict[str, list[Any]],
    generators: list[torch.Generator],
    *,
    check_guided: bool = True,
    check_unguided: bool = True,
) -> None:
    """Compare prepare, predict and decode with the pipeline's own call.

    Args:
        replay: the replay to check.
        columns, generators: a small batch as for `replay.prepare`. The generators are copied, and do not advance; nor does the
            global random number generator.
        check_guided, check_unguided: whether training will call `predict` for guided, and for unguided, predictions.

    Raises:
        ValueError: if the pipeline breaks a convention; the message names the pipeline, the convention and a way out.
    """
    with errors_explained(replay, columns, generators), torch.no_grad():
        check = _Check(replay, columns, generators, check_guided, check_unguided)
        check.decoding_has_a_gradient()
        check.prediction_is_a_function()
        check.samples_are_apart()
        steps = check.own_steps(stop_after=2)
        check.loop_starts_from_prepared_latents(steps[0])
        check.latents_are_the_schedulers(steps)
        check.prediction_is_the_pipelines(steps)
        if check_unguided:
            check.guidance_can_be_switched_off()
        check.derivative_is_right(steps[-1].sample)
        check.decoding_is_the_pipelines()
        check.warn_of_a_flow_map()


class _Check:
    """The check on one small batch, with a method for each convention."""

    def __init__(
        self,
        replay: PipelineReplay,
        columns: dict[str, list[Any]],
        generators: list[torch.Generator],
        guided: bool,
        unguided: bool,
    ) -> None:
        self.replay = replay
        self.columns = columns
        self.generators = generators
        replay.find_state(columns, self._generators(), guided=guided)
        self.guided = guided  # the mode of predictions and calls, unless a method sets another
        self.x, self.conditioning = replay.prepare(columns, self._generators(), guided=guided, unguided=unguided)
        if replay.chooses_frames:  # first, so that the decodings of this check use no more memory than training
            replay.find_frames(self.x, self.conditioning)

    def decoding_has_a_gradient(self) -> None:
        """The decoder has a gradient, by one backward pass. Checked first, because no setting can fix a missing gradient."""
        leaf = self.x.clone().requires_grad_()
        if self.replay.runs_safety_checker:
            way_out = (
                "use a pipeline whose __call__ hands its images to no safety checker, which takes them as numpy arrays, or set "
                "its safety_checker to None where its licence and its code allow that"
            )
        else:
            way_out = "remove torch.no_grad(), detach() and numpy arrays from its decoder, or from a __call__ of your own"
        with noting_tiles(getattr(self.replay.pipeline, "vae", None)) as tiles:
            decoded = self._recorded(
                lambda: self.replay.decode(leaf, self.conditioning), leaf, "decodes without gradient", way_out
            )
        if tiles:
            warn_of_tiles(self.replay.pipeline.vae)
        if _gradient(decoded, leaf, torch.ones_like(decoded)) is None:
            raise self._error("decodes without gradient", way_out)
        self._require_the_decoders_derivative(leaf, decoded)

    def _require_the_decoders_derivative(self, leaf: Tensor, decoded: Tensor) -> None:
        """A decoder with quantised weights has the right gradient. Others are not checked: finite differences cost more here."""
        vae = getattr(self.replay.pipeline, "vae", None)
        stored = quantisation_of(vae) if isinstance(vae, torch.nn.Module) else None
        if stored is None:
            return
        tolerance, sizes = _COARSE
        decode = partial(self.replay.decode, conditioning=self.conditioning)
        errors = [self._derivative_error(leaf, decoded, decode, size) for size in sizes]
        if min(errors) > tolerance:
            raise self._error(
                f"decodes with a derivative that differs from finite differences by {min(errors):.1%}",
                _way_out_of_quantisation("vae", stored),
            )

    def prediction_is_a_function(self) -> None:
        """The same input gives a bitwise identical prediction, even after a prediction at another step."""
        last = len(self.replay.timesteps) - 1  # a cache may be reset at the first step, so the last one is tested too
        first, then, again, back = (self._predict(self.x, index) for index in (0, last, last, 0))
        if not (first.isfinite().all() and then.isfinite().all()):
            raise self._error("predicts values that are not finite", "load it in bfloat16 or float32")
        self.prediction = first
        if not (torch.equal(first, back) and torch.equal(then, again)):
            raise self._error(
                "gives two predictions for the same input",
                "switch off what remembers earlier steps (a guider's momentum, a cache) or is random (dropout, numbers that are "
                "not drawn from the call's generators)",
            )

    def samples_are_apart(self) -> None:
        """The first sample does not depend on the image of the last sample.

        It would if the pipeline took a list of images, one per sample, for several reference images of every sample.
        """
        taken = self.replay.arguments.taken(self.columns)
        others = {name: other for name, values in taken.items() if (other := _another(values[-1])) is not None}
        if len(self.x) == 1 or not others:
            return
        columns = {**self.columns, **{name: [*taken[name][:-1], other] for name, other in others.items()}}
        own = self.replay.memoryless_sample(columns, self._generators(), guided=self.guided, stop_after=2)[1]
        self.latents_are_the_schedulers(own)
        modes = {"guided": self.guided, "unguided": not self.guided}
        start, conditioning = self.replay.prepare(columns, self._generators(), **modes)
        prediction = self.replay.predict(self.x, 0, conditioning, guided=self.guided)
        if not (_equal(start[0], self.x[0]) and _equal(prediction[0], self._predict(self.x, 0)[0])):
            raise self._error("makes the samples of a batch depend on each other's images", ONE_SAMPLE)

    def loop_starts_from_prepared_latents(self, first: RecordedStep) -> None:
        if not _equal(self.conditioning.start, first.sample):
            raise self._error(
                "does not start its loop from what prepare_latents returns",
                "use a pipeline that leaves these latents as they are",
            )

    def latents_are_the_schedulers(self, steps: list[RecordedStep]) -> None:
        """Each step starts from the sample that the scheduler returned in the step before."""
        dtype = self.conditioning.start.dtype  # dtype of the latents between steps; `step` may get them in a higher precision
        for now, after in zip(steps, steps[1:], strict=False):
            if not _equal(now.prev_sample.to(dtype).to(after.sample.dtype), after.sample):
                raise self._error(
                    "changes the latents between two steps (as inpainting does)",
                    "use a pipeline without that feature, such as an inpainting one whose mask is an input of its network",
                )

    def prediction_is_the_pipelines(self, steps: list[RecordedStep], guided: bool | None = None) -> None:
        """The replayed prediction of each step equals the model output that the pipeline's own call passed to its scheduler."""
        for index, step in enumerate(steps):
            if not _equal(self._predict(step.sample, index, guided), step.model_output):
                memory = (
                    ", and keeps nothing of an earlier step (a cache of keys and values, a guider's momentum)" if index else ""
                )
                raise self._error(
                    f"hands another prediction to scheduler.step at step {index} than its replay",
                    f"use a pipeline whose own __call__ loops over scheduler.timesteps{memory}",
                )

    def guidance_can_be_switched_off(self) -> None:
        """Without guidance, a prediction depends on one evaluation of the batch and equals that of the pipeline's own call."""
        with counting_rows(*self._denoisers) as rows:
            self._predict(self.x, 0, guided=False)
        if sum(rows) != len(self.x) and self._acting(rows) != 1:
            raise self._error(
                f"evaluates {sum(rows)} rows for {len(self.x)} samples without guidance",
                "switch its guidance off, through pipeline_kwargs or in its guider, or train with cfg_mode='full'",
            )
        self.prediction_is_the_pipelines(self.own_steps(stop_after=1, guided=False), guided=False)

    def _acting(self, rows: list[int]) -> int:
        """The number of evaluations of the batch on which the prediction without guidance depends.

        Some pipelines evaluate all predictions, also without guidance, and give some of them the weight 0.

        Args:
            rows: number of rows in each call of the denoisers.
        """
        size, acting, least = len(self.x), 0, _ACTS_FINE if self._is_fine else _ACTS_COARSE
        prediction = self._predict(self.x, 0, guided=False)
        for call, part in [(call, part) for call, number in enumerate(rows) for part in range(0, number, size)]:
            with scaling_rows(call, slice(part, part + size), *self._denoisers):
                change = self._predict(self.x, 0, guided=False) - prediction
            acting += bool(change.norm() > least * prediction.norm())
        return acting

    def derivative_is_right(self, x: Tensor) -> None:
        """Autograd agrees with finite differences. If a part runs under no_grad, autograd is wrong without an error."""
        (tolerance, sizes), same = (_FINE, _SAME_FINE) if self._is_fine else (_COARSE, _SAME_COARSE)
        errors, index, leaf = [], self._step_of_the_trained_network(), x.to(self.x.dtype, copy=True).requires_grad_()
        way_out = self._way_out_of_quantisation() or _OTHER_KERNELS
        output = self._recorded(lambda: self._predict(leaf, index), leaf, "predicts without gradient", way_out)
        change = (output.detach() - self._predict(leaf, index)).norm() / output.norm()
        if change > same:
            raise self._error(
                f"predicts something else, by {change:.1%}, when gradients are recorded", "train without gradient checkpointing"
            )
        for size in sizes:
            errors.append(self._derivative_error(leaf, output, lambda x: self._predict(x, index), size))
            if errors[-1] <= tolerance:
                return
        raise self._error(
            f"has a derivative in x that differs from finite differences by {min(errors):.1%}",
            self._way_out_of_quantisation()
            or "remove torch.no_grad() or detach() from its denoiser, or from a __call__ of your own",
        )

    def decoding_is_the_pipelines(self) -> None:
        """The final latents of the pipeline's own call (here of two steps) give the same images when replayed with gradients."""
        # Pipelines that start below full noise skip a part of the steps.
        few = math.ceil(2 * len(self.replay.scheduler.timesteps) / len(self.replay.timesteps))
        given = self.columns, self._generators()
        made, steps = self.replay.memoryless_sample(*given, guided=self.guided, num_inference_steps=few)
        assert made is not None  # nothing stops this call
        images = made.images
        if not isinstance(images, Tensor) or len(images) != len(self.x):
            found = f"{len(images)} images" if isinstance(images, Tensor) else f"a {type(images).__name__}"
            raise self._error(f"returns {found} for {len(self.x)} samples", "use a pipeline whose first output is their tensor")
        if images.ndim > 3 and images.min() < -_RANGE:  # not by rounding alone
            logger.warning(
                f"{self.replay.name} returns its images as tensors between {images.min():.2g} and {images.max():.2g}, where "
                f"rewards and statistics take them to be between 0 and 1; map them there, by (images / 2 + 0.5).clamp(0, 1)."
            )
        latents = steps[-1].prev_sample.to(self.x.dtype).requires_grad_()
        with torch.enable_grad():
            decoded = self.replay.decode_media(latents, self.conditioning)
        if not _alike(decoded, made):
            if not _alike(decoded, self.replay.decode_media(latents, self.conditioning)):
                raise self._error(
                    "decodes the same latents to other images each time",
                    "switch off the noise that its decoder draws, unless it draws it from the call's generators",
                )
            raise self._error(
                "decodes the same latents to other images than its replay", "use a pipeline whose decoder comes after its loop"
            )

    def warn_of_a_flow_map(self) -> None:
        """Warn if the network is a flow map, which predicts the step to the next timestep; its replay is correct."""
        if len(self.replay.timesteps) > 1 and self.replay.looks_ahead(
            self.x, self.conditioning, self.prediction, guided=self.guided
        ):
            logger.warning(
                f"the {self.replay.component} of {self.replay.name} is told the timestep that each step goes to, so it predicts "
                f"the way there, as models distilled to few steps do, and not the velocity that the memoryless chain needs; "
                f"train the model that it was distilled from."
            )

    def own_steps(self, stop_after: int, guided: bool | None = None) -> list[RecordedStep]:
        """The first `stop_after` steps of the pipeline's own call on the memoryless scheduler."""
        guided = self.guided if guided is None else guided
        return self.replay.memoryless_sample(self.columns, self._generators(), guided=guided, stop_after=stop_after)[1]

    def _derivative_error(self, leaf: Tensor, output: Tensor, function: Callable[[Tensor], Tensor], size: float) -> float:
        """Relative error of the derivative J of `function` at x = `leaf`.

        It is the median of |⟨w, Ju⟩ − ⟨Jᵀw, u⟩| / |⟨w, Ju⟩| over random directions u with ‖u‖ = `size`·‖x‖. Ju is a five-point
        difference, whose truncation error is of fifth order in u. w is another estimate of Ju: rounding has least effect along
        this direction, and since w comes from another evaluation, its rounding is independent of that of Ju.

        Args:
            output: function(leaf), with its autograd graph.
        """
        x = leaf.detach()
        generator, errors = torch.Generator().manual_seed(0), []
        for _ in range(_DIRECTIONS):
            noise = torch.randn(x.shape, generator=generator).to(x)
            u = noise * (size * x.norm() / noise.norm())
            points = [self._rounded(x + step * u) for step in (-2, -1, 1, 2)]
            change = _five_point_difference([function(point) for point in points])
            w = function(self._rounded(x + 4 * u)) - output.detach()
            expected = _dot(w, change)
            pullback = _dot(_pullback(output, leaf, w), _five_point_difference(points))
            errors.append(abs(expected - pullback) / max(abs(expected), torch.finfo(torch.float64).tiny))
        return statistics.median(errors)

    def _rounded(self, x: Tensor) -> Tensor:
        """x, rounded to the pipeline's dtype as `predict` does."""
        return x.to(self.conditioning.start.dtype).to(x.dtype)

    def _predict(self, x: Tensor, index: int, guided: bool | None = None) -> Tensor:
        guided = self.guided if guided is None else guided
        return self.replay.predict(x, index, self.conditioning, guided=guided)

    def _step_of_the_trained_network(self) -> int:
        """The second step, or the last one if another network predicts at the second step."""
        last = len(self.replay.timesteps) - 1
        if len(self.replay.denoisers) > 1:
            with counting_rows(self._denoiser) as rows:
                self._predict(self.x, min(1, last))
            if not rows:
                return last
        return min(1, last)

    @property
    def _denoisers(self) -> list[torch.nn.Module]:
        return [getattr(self.replay.pipeline, name) for name in self.replay.denoisers]

    @property
    def _denoiser(self) -> torch.nn.Module:
        denoiser: torch.nn.Module = getattr(self.replay.pipeline, self.replay.component)
        return denoiser

    @property
    def _is_fine(self) -> bool:
        """Whether both the latents and the network are in float32 or float64."""
        return {self.conditioning.start.dtype, next(self._denoiser.parameters()).dtype} <= {torch.float32, torch.float64}

    def _generators(self) -> list[torch.Generator]:
        return copied(self.generators)

    def _recorded(self, function: Callable[[], Tensor], leaf: Tensor, broken: str, way_out: str) -> Tensor:
        """The function's value with its autograd graph, after a backward pass as a test.

        Args:
            function: to evaluate.
            leaf: tensor that requires a gradient.
            broken, way_out: for the message of the error.

        Raises:
            ValueError: if the function or its backward pass fails, but the function does not fail without gradients.
        """
        try:
            with torch.enable_grad():
                value = function()
            _gradient(value, leaf, torch.ones_like(value))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            function()  # without gradient; if this raises too, the gradient is not the cause
            raise self._error(f"{broken} ({said(error)})", way_out) from error
        return value

    def _way_out_of_quantisation(self) -> str | None:
        """The way out of a missing gradient if the denoiser's weights are quantised; `None` if they are not."""
        stored = quantisation_of(self._denoiser)
        return stored and _way_out_of_quantisation(self.replay.component, stored)

    def _error(self, broken: str, way_out: str) -> ValueError:
        return refusal(self.replay, broken, way_out)


def _another(value: Any) -> Any:
    """A different image or embedding (or list of them); `None` for anything else."""
    if isinstance(value, Image.Image):
        return ImageOps.invert(value.convert("RGB"))
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.flip(-1)
    if isinstance(value, list):
        others = [_another(item) for item in value]
        return None if any(other is None for other in others) else others
    return None


def _way_out_of_quantisation(name: str, stored: str) -> str:
    return (
        f"load its {name} unquantised (it holds {stored}), or in a scheme with a gradient, such as torchao's "
        f"Int8WeightOnlyConfig (quantised activations have none)"
    )


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)


def _alike(a: Media, b: Media) -> bool:
    pairs = zip(a, b, strict=True)
    return all(
        one is other or (one is not None and other is not None and _equal(one.detach(), other.detach())) for one, other in pairs
    )


def _dot(a: Tensor, b: Tensor) -> float:
    return (a.double() * b.double()).sum().item()


def _five_point_difference(values: list[Tensor]) -> Tensor:
    """f(x + u) − f(x) to first order in u, from f at x − 2u, x − u, x + u, x + 2u."""
    far_back, back, ahead, far_ahead = (value.double() for value in values)
    return (far_back - 8 * back + 8 * ahead - far_ahead) / 12


def _pullback(output: Tensor, leaf: Tensor, cotangent: Tensor) -> Tensor:
    """Jᵀ·cotangent; zero if `output` does not depend on `leaf` in the autograd graph."""
    gradient = _gradient(output, leaf, cotangent)
    return torch.zeros_like(leaf) if gradient is None else gradient


def _gradient(output: Tensor, leaf: Tensor, cotangent: Tensor) -> Tensor | None:
    """Jᵀ·cotangent; `None` if `output` does not depend on `leaf` in the autograd graph."""
    if not output.requires_grad:
        return None
    return torch.autograd.grad(output, leaf, cotangent, retain_graph=True, allow_unused=True)[0]
