"""Replay of a diffusers pipeline: its own `__call__` as prepare → x_0, predict → m(x, t_k), decode → images.

Every pipeline passes its guided prediction to `scheduler.step`. Replay runs the pipeline's call without `torch.no_grad`, on a
scheduler that captures this prediction (`stand_in.py`). This gives the differentiable function that Adjoint Matching needs, for
any network, guidance and latent layout. Text encodings and initial latents are recorded once and replayed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModularPipeline
from torch import Tensor, nn

from ..core.transition import Transition
from ..schedulers.memoryless import MemorylessStep
from .arguments import CallArguments
from .calls import PipelineCalls
from .conditioning import (
    Conditioning,
    Numbering,
    Origin,
    Preparations,
    Recording,
    copied,
    joined,
    latents_in,
    origin_of,
    place_of,
)
from .frames import FrameLayout
from .modular import ModularCall
from .plain import AUDIO, Media
from .slices import Decode, decoding, has_decoder, measuring, same
from .stand_in import RecordedStep, ReplayStop, joined_steps, make_probe, make_recorder, probe_class
from .view import counting_rows, denoiser_names, no_guidance, set_differentiable

__all__ = ["PipelineReplay"]


class PipelineReplay:
    """A pipeline's own code as prepare, predict and decode.

    Args:
        pipeline: a pipeline with a transformer or a UNet, modular or not. Its denoisers are set to evaluation mode (no dropout);
            nothing else of it is modified.
        scheduler: the memoryless scheduler that replaces the pipeline's own; `prepare` sets its tables.
        num_inference_steps: K, the number of steps of the full grid.
        guidance_scale: scale of classifier-free guidance, 1 for none; or the scale that a guidance-distilled network takes as an
            input.
        pipeline_kwargs: further arguments of every call (height, max_sequence_length, …).
        component: name of the denoiser to train; `None` for the one that diffusers puts LoRA on.
        chooses_frames: whether `decode` will be called for a subset of a video's frames.

    Attributes:
        component: the denoiser's name in the pipeline.
        denoisers: names of all networks that may predict; a pipeline may have a second one for its later steps.
        arguments: the arguments of the pipeline's `__call__`.
        num_inference_steps: K of the last `prepare`: the number given, or the length of `sigmas` if the call has these.
        guides_itself: whether the call guides although no guidance scale is set; set by `find_guidance`.
        guidance_is_distilled: whether the network takes the guidance scale as an input, and the scale is above 1.
        frame_layout: which frames the VAE decodes from which latent frames; `None` until `find_frames` sets it.

    Raises:
        TypeError: if `pipeline` is not a diffusers pipeline.
        ValueError: if it cannot be replayed, or does not accept an argument given here.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline | ModularPipeline,
        scheduler: Any,
        num_inference_steps: int,
        *,
        guidance_scale: float = 1.0,
        pipeline_kwargs: dict[str, Any] | None = None,
        component: str | None = None,
        chooses_frames: bool = False,
    ) -> None:
        self.denoisers = denoiser_names(pipeline, component)
        self.component = component or self.denoisers[0]
        self.pipeline = pipeline
        self.scheduler = scheduler
        for name in self.denoisers:
            set_differentiable(getattr(pipeline, name))
        self._calls = PipelineCalls(pipeline, self.component)
        self._probe_class = probe_class(type(scheduler))
        self._origins = {0: Origin(self._calls.call.source)}  # number of a scheduler, or of a copy → its latents
        self._state_is_found = False
        self._first = 0
        self.guides_itself = False
        self.guidance_is_distilled = self.embeds_guidance and guidance_scale > 1
        self.num_inference_steps = num_inference_steps
        self.chooses_frames = chooses_frames
        self.frame_layout: FrameLayout | None = None
        self.arguments = CallArguments(
            self.name,
            self._calls.call,
            num_inference_steps,
            guidance_scale,
            pipeline_kwargs or {},
            guidance_embedded=self.embeds_guidance,
            no_guidance=no_guidance(pipeline),
        )

    @property
    def name(self) -> str:
        """The pipeline's class name, for messages."""
        return type(self.pipeline).__name__

    @property
    def modular_call(self) -> ModularCall | None:
        """The call of a modular pipeline; `None` for other pipelines."""
        call = self._calls.call
        return call if isinstance(call, ModularCall) else None

    def not_loaded(self, columns: dict[str, list[Any]]) -> list[str]:
        """Names of the components that a modular pipeline's blocks may need for these columns, and that are not loaded."""
        if self.modular_call is None:
            return []
        arguments = self.arguments(columns, len(next(iter(columns.values()), [None])))
        return self.modular_call.not_loaded(self.pipeline, arguments)

    @property
    def exchanges_processors(self) -> bool:
        """Whether the pipeline replaces the attention processors during its loop, as for perturbed attention."""
        return self._calls.call.exchanges_processors

    @property
    def runs_safety_checker(self) -> bool:
        """Whether the call runs a safety checker on its images, even when replayed."""
        return self._calls.call.insists_on_safety_checker and self.pipeline.safety_checker is not None

    @property
    def makes_audio(self) -> bool:
        """Whether the pipeline makes sound along with its videos."""
        return AUDIO in self._calls.call.outputs[1:]

    @property
    def embeds_guidance(self) -> bool:
        """Whether the guidance scale is an input of the network (guidance distillation), and not classifier-free guidance."""
        return bool(getattr(self.pipeline, self.component).config.get("guidance_embeds", False))

    @contextmanager
    def on(self, scheduler: Any) -> Iterator[None]:
        """Within this context, use another memoryless scheduler of the same class, on its own grid until the next `prepare`."""
        own, self.scheduler = self.scheduler, scheduler
        try:
            yield
        finally:
            self.scheduler = own

    # ------------------------------------------------------------------------------------------------- the grid in use

    @property
    def timesteps(self) -> Tensor:
        """Timesteps of the steps that the pipeline takes, shape (K',). K' = K, or less if it starts below full noise."""
        return self.scheduler.timesteps[self._first :]

    @property
    def stds(self) -> Tensor:
        """Noise std s_k of each of these steps, shape (K',), float64, CPU."""
        return self.scheduler.stds[self._first :]

    @property
    def starts_below_noise(self) -> bool:
        """Whether the pipeline skips the first steps, as image-to-image does; x_0 is then a noisy image, not pure noise."""
        return self._first > 0

    @property
    def gains(self) -> Tensor:
        """g_k of these steps, shape (K',); see the scheduler's `gains`."""
        return self.scheduler.gains[self._first :]

    @property
    def posterior_stds(self) -> Tensor:
        """Posterior std of each of these steps, shape (K',); see the scheduler's `posterior_stds`."""
        return self.scheduler.posterior_stds[self._first :]

    @property
    def levels(self) -> Tensor:
        """α_k and β_k of these steps, shape (2, K'); see the scheduler's `levels`."""
        return self.scheduler.levels[:, self._first :]

    @property
    def times(self) -> Tensor:
        """t_k of these steps, shape (K',); see the scheduler's `times`."""
        return self.scheduler.times[self._first :]

    def transition(self, model_output: Tensor, x: Tensor, index: int) -> Transition:
        """Distribution of the next state at step `index` (0 ≤ index < K')."""
        return self.scheduler.transition(model_output, x, self._first + index)

    def noised(self, clean: Tensor, noise: Tensor, index: int) -> Tensor:
        """Clean data, noised to the level of step `index` (0 ≤ index < K')."""
        return self.scheduler.noised(clean, noise, self._first + index)

    def toward(self, clean: Tensor, x: Tensor, index: int) -> Tensor:
        """Mean of step `index` (0 ≤ index < K') from x if the clean prediction is `clean`."""
        return self.scheduler.toward(clean, x, self._first + index)

    def clean(self, mean: Tensor, x: Tensor, index: int) -> Tensor:
        """The clean prediction for which step `index` (0 ≤ index < K') from x has this mean."""
        return self.scheduler.clean(mean, x, self._first + index)

    # --------------------------------------------------------------------------------------- prepare, predict, decode

    def prepare(
        self,
        columns: dict[str, list[Any]],
        generators: list[torch.Generator],
        *,
        guided: bool = True,
        unguided: bool = True,
    ) -> tuple[Tensor, Conditioning]:
        """Run the pipeline's call up to its loop: encode the prompts, draw x_0, set the scheduler's tables.

        Args:
            columns: name → list of B values, for each per-sample argument of the pipeline's `__call__`, including "prompt".
                Other columns are ignored.
            generators: B generators, one for each sample, so that a sample's x_0 does not depend on the rest of its batch.
            guided, unguided: whether `predict` will be called for guided, and for unguided, predictions. A text is encoded once
                for both.

        Returns:
            x_0 of shape (B, …) in float32 (float64 for a float64 pipeline), and the conditioning for `predict` and `decode`.

        Raises:
            ValueError: if the columns do not fit the pipeline's call, or its loop cannot be replayed.
        """
        # Some pipelines prepare differently without guidance, so each mode has its own dry run, with the same random numbers.
        texts: dict[str, list[Any]] = {}
        before = copied(generators)
        recordings: dict[bool, Recording] = {}
        for mode in [mode for mode, wanted in ((True, guided), (False, unguided)) if wanted]:
            if recordings and not self.arguments.guides:
                recordings[mode] = next(iter(recordings.values()))
                continue
            for generator, start in zip(generators, before, strict=True):
                generator.set_state(start.get_state())
            recordings[mode] = self._dry_run(columns, generators, texts, guided=mode)
        conditioning = Conditioning(recordings, tuple(self._origins.values()), tuple(before))
        x = conditioning.start
        return x.to(torch.promote_types(x.dtype, torch.float32)), conditioning

    def predict(
        self,
        x: Tensor,
        index: int,
        conditioning: Conditioning,
        *,
        guided: bool = True,
        denoiser: nn.Module | None = None,
        grid: Any = None,
    ) -> Tensor:
        """m(x, t_index): the model output that the pipeline passes to `scheduler.step` at step `index` for the latents x.

        It is differentiable in x and in the denoiser's parameters. The denoiser is evaluated as often as in one step of the
        pipeline.

        Args:
            x: the state, shape (B, …) as x_0 of `prepare`; it is rounded to the pipeline's dtype.
            index: the step, 0 ≤ index < K'.
            conditioning: result of the last `prepare` (each `prepare` sets the scheduler's tables anew).
            guided: False switches off guidance by its scales; the scale that a distilled network takes as an input is kept.
            denoiser: module that replaces the pipeline's denoiser, such as a frozen copy, or a wrapper around the original.
            grid: the scheduler with another noise level at `index`, from its `ending_at`; `None` for the scheduler itself.

        Returns:
            The model output, shape (B, …), in the dtype in which the pipeline computes it.

        Raises:
            ValueError: if the index is not on the grid, x does not have the shape of x_0, or the pipeline does not call
                `scheduler.step` at this step.
        """
        steps = len(self.timesteps)
        if not 0 <= index < steps:
            raise ValueError(f"index={index} is not on the grid; pass 0 to {steps - 1}.")
        # Counted from the end: skipping the first steps changes a step's index, but not its distance to the end.
        given = grid or self.scheduler, (index - steps,), tuple(self._origins)
        probe = make_probe(self._probe_class, *given)
        recording, returns = conditioning.recording(guided), conditioning.returns_with(x, guided)
        with suppress(ReplayStop):
            self._calls.replayed(probe, recording, conditioning.generators, returns, x.device, denoiser)
        # A pipeline that doubles its batch for guidance may pass 2 B rows to `step`; the first B are the prediction.
        return joined([output[: len(x)] for output in self._captured(probe, index)])

    def _captured(self, probe: Any, index: int) -> list[Tensor]:
        """The model outputs that the scheduler and its copies captured, one for each latent of the state."""
        streams = [probe.streams[number] for number in self._origins if number < len(probe.streams)]
        captured = [stream.captured for stream in streams if stream.captured is not None]
        if not captured:
            raise ValueError(f"{self.name} does not call scheduler.step at step {index}; it cannot be replayed.")
        if len(captured) < len(self._origins):
            raise self._not_one_chain("one is called more often than another")
        return captured

    def decode(self, x: Tensor, conditioning: Conditioning, frames: Sequence[int] | None = None) -> Tensor:
        """Decode final latents x by the pipeline's own unpacking, VAE and post-processing, without a denoiser evaluation.

        Args:
            x: final latents, shape (B, …).
            conditioning: as for `predict`.
            frames: indices of the video frames to decode, ascending; only after `find_frames`. `None` for all frames.

        Returns:
            Images (B, 3, H, W) in [0, 1], videos (B, F, 3, H, W) or waveforms (B, …), in the pipeline's dtype. They are
            differentiable in x, but the pipeline clamps images, so a saturated pixel has no gradient. Chosen frames have the
            same gradient as in a decoding of the whole video. After `find_frames`, a decoder that works in slices needs one
            more forward pass, but only the memory of one slice.

        Raises:
            ValueError: if x does not have the shape of x_0, or the pipeline calls `scheduler.step` outside its loop.
        """
        return self.decode_media(x, conditioning, frames).images

    def decode_media(self, x: Tensor, conditioning: Conditioning, frames: Sequence[int] | None = None) -> Media:
        """As `decode`, along with the sound of the videos if the pipeline makes it."""
        layout = self.frame_layout
        if layout is None:
            return self._decode(x, conditioning)
        return self._decode(x, conditioning, decoding(layout, range(layout.num_frames) if frames is None else frames))

    def _decode(self, x: Tensor, conditioning: Conditioning, decoding: Callable[[Any], Decode] | None = None) -> Media:
        probe = make_probe(self._probe_class, self.scheduler, visit=())
        guided = True in conditioning.recordings
        recording, returns = conditioning.recording(guided), conditioning.returns_with(x, guided)
        try:
            return self._calls.replayed(probe, recording, conditioning.generators, returns, x.device, decoding=decoding)
        except ReplayStop:
            raise ValueError(
                f"{self.name} calls scheduler.step outside its loop over timesteps; it cannot be replayed."
            ) from None

    def sample(
        self,
        columns: dict[str, list[Any]],
        generators: list[torch.Generator],
        noise: list[torch.Generator] | None = None,
        *,
        guided: bool = True,
    ) -> Tensor:
        """Sample by an ordinary call of the pipeline, with its own scheduler unless `noise` is given, and the same arguments.

        Args:
            columns, generators: as for `prepare`; a stochastic scheduler draws from the generators too.
            noise: B generators for the step noise of the memoryless scheduler, which then replaces the pipeline's own; `None`
                for the pipeline's scheduler.
            guided: False switches off guidance by its scales.

        Returns:
            Images (B, 3, H, W) in [0, 1], or videos or waveforms as from `decode`, without an autograd graph.
        """
        return self.sample_media(columns, generators, noise, guided=guided).images

    def sample_media(
        self,
        columns: dict[str, list[Any]],
        generators: list[torch.Generator],
        noise: list[torch.Generator] | None = None,
        *,
        guided: bool = True,
    ) -> Media:
        """As `sample`, along with the sound of the videos if the pipeline makes it."""
        if noise is None:
            scheduler = copy.deepcopy(self.pipeline.scheduler)
            if isinstance(scheduler, MemorylessStep):
                # A deep copy shares its noise source. A copied source leaves the user's unchanged, so two calls draw the same.
                scheduler.set_generator(copy.deepcopy(scheduler.generator))
        else:
            scheduler = make_recorder(self.scheduler, noise, kept=1)
        return self._calls.ordinary(scheduler, self.arguments(columns, len(generators), guided=guided), generators)

    def memoryless_sample(
        self,
        columns: dict[str, list[Any]],
        generators: list[torch.Generator],
        *,
        guided: bool = True,
        stop_after: int | None = None,
        **arguments: Any,
    ) -> tuple[Media | None, list[RecordedStep]]:
        """Sample by the pipeline's own, unchanged `__call__` on the memoryless scheduler, and record its steps.

        Args:
            columns, generators: as for `prepare`.
            guided: False switches off guidance by its scales.
            stop_after: stop the call after this many steps; `None` for the whole call.
            arguments: override arguments of the call.

        Returns:
            The output of the call, `None` if it was stopped; and its steps.

        Raises:
            ValueError: if several schedulers differ in their number of steps, their timesteps or their noise levels.
        """
        recorder = make_recorder(self.scheduler, generators, stop_after)
        made, call = None, {**self.arguments(columns, len(generators), guided=guided), **arguments}
        with suppress(ReplayStop):
            made = self._calls.ordinary(recorder, call, generators)
        return made, self._steps_of(recorder)

    # ----------------------------------------------------------------------------- networks, guidance, state and frames

    def idle_steps(self, x: Tensor, conditioning: Conditioning, *, guided: bool) -> list[int]:
        """Indices of the steps at which the trained network is not evaluated, because the pipeline uses another one there.

        If the pipeline has several networks, this takes one prediction for each step.

        Args:
            x: any state, shape (B, …).
            conditioning, guided: as for `predict`.

        Raises:
            ValueError: if the trained network is not evaluated at any step.
        """
        idle = []
        for index in range(len(self.timesteps)) if len(self.denoisers) > 1 else ():
            with torch.no_grad(), counting_rows(getattr(self.pipeline, self.component)) as rows:
                self.predict(x, index, conditioning, guided=guided)
            if not rows:
                idle.append(index)
        if len(idle) == len(self.timesteps):
            raise ValueError(
                f"{self.name} does not use its {self.component} at any of {len(idle)} steps; take another trained_component, or "
                f"more steps."
            )
        return idle

    def looks_ahead(self, x: Tensor, conditioning: Conditioning, prediction: Tensor, *, guided: bool = True) -> bool:
        """Whether the prediction depends on the next timestep of the grid, as in a distilled flow map.

        This takes one prediction.

        Args:
            x: any state, shape (B, …).
            conditioning, guided: as for `predict`.
            prediction: m(x, t_0), shape (B, …).
        """
        grid = copy.copy(self.scheduler)
        grid.timesteps = grid.timesteps.clone()
        grid.timesteps[self._first + 1] = grid.timesteps[self._first]
        with torch.no_grad():
            return not torch.equal(self.predict(x, 0, conditioning, guided=guided, grid=grid), prediction)

    def find_guidance(self, x: Tensor, conditioning: Conditioning) -> None:
        """Set `guides_itself`: whether the call guides although no guidance scale is set, as perturbed attention does.

        A call guides if it evaluates more than B rows in a step. This takes one prediction. Call it only if the loss uses guided
        predictions and no guidance scale is set; for a loss without guidance the start check refuses such a pipeline.

        Args:
            x: any state, shape (B, …).
            conditioning: as for `predict`.
        """
        with torch.no_grad(), counting_rows(*(getattr(self.pipeline, name) for name in self.denoisers)) as rows:
            self.predict(x, 0, conditioning)
        self.guides_itself = sum(rows) > len(x)

    def find_state(self, columns: dict[str, list[Any]], generators: list[torch.Generator], *, guided: bool = True) -> None:
        """Find which of the prepared latents make up the state, by one or a few first steps of the pipeline's call.

        Usually the state is the tensor of prepared latents. Some pipelines keep condition frames or channels in the same tensor,
        or unpack it before `scheduler.step`: the state may then be any selection of its elements, in any order. Others step
        several latents, each with a copy of their scheduler: each further latent must be the output of a prepare_… method.

        Call this before `prepare`.

        Args:
            columns, generators: as for `prepare`.
            guided: False switches off guidance by its scales.

        Raises:
            ValueError: if a copy of the scheduler steps a tensor that no prepare_… method returned.
        """
        source = self._calls.call.source
        if source == "randn_tensor":
            return
        preparations = Preparations(generators)
        arguments = self.arguments(columns, len(generators), guided=guided)
        first = self._first_samples(arguments, generators, preparations)
        self._state_is_found = True
        if not first or source not in preparations.returns:
            return
        (main, sample), *others = first.items()
        self._origins = {main: Origin(source)}
        for number, latent in others:
            if (origin := origin_of(latent, preparations.returns)) is None:
                raise self._not_one_chain("what one of them steps is not what a prepare_… method returns")
            self._origins[number] = origin
        latents = latents_in(preparations.returns[source][0].value)
        if sample.shape == latents.shape and torch.equal(sample.to(latents.dtype), latents):
            return
        numbered = [self._first_samples(arguments, copied(generators), Numbering(d)) for d in Numbering.digits_of(latents)]
        place = place_of(sample, latents, [samples[main] for samples in numbered if main in samples])
        self._origins[main] = Origin(source, place=place)

    def _first_samples(
        self, arguments: dict[str, Any], generators: list[torch.Generator], latents: Preparations | Numbering
    ) -> dict[int, Tensor]:
        """Number of a scheduler (0, then its copies) → the first sample that the pipeline's own call passes to its `step`."""
        recorder = make_recorder(self.scheduler, generators, stop_after=1)
        with suppress(ReplayStop):
            self._calls.ordinary(recorder, arguments, generators, latents)
        self._steps_of(recorder)
        return {number: stream.record[0].sample for number, stream in enumerate(recorder.streams) if stream.record}

    def _steps_of(self, recorder: Any) -> list[RecordedStep]:
        try:
            return joined_steps(recorder)
        except ValueError as error:
            raise self._not_one_chain(str(error)) from None

    def _not_one_chain(self, why: str) -> ValueError:
        return ValueError(
            f"{self.name} steps several latents with copies of its scheduler, and these are not one chain, because {why}; use a "
            f"pipeline with one scheduler, or one whose schedulers step prepared latents in turns on one grid."
        )

    def find_frames(self, x: Tensor, conditioning: Conditioning) -> None:
        """Set `frame_layout`: which frames the VAE can decode separately. This takes a few decodings without gradient.

        Args:
            x: any state, shape (B, …).
            conditioning: as for `predict`.

        Raises:
            ValueError: if the pipeline makes no video by a VAE, or its frames cannot be decoded separately.
        """
        found: list[FrameLayout] = []
        with torch.no_grad():
            whole = self._decode(x, conditioning, self._measuring(found)).images
        if whole.ndim != 5 or len(found) != 1:
            raise ValueError(
                f"decode_frames chooses from the frames of a video, whose latents (B, C, F, H, W) a VAE decodes together, and "
                f"{self.name} decodes none; leave it out."
            )
        self.frame_layout = found[0]
        chosen = self.frame_layout.frames_of([len(self.frame_layout.sizes) // 2])
        with torch.no_grad():
            alone = self.decode(x, conditioning, chosen)
        if len(whole[0]) != self.frame_layout.num_frames or not same(alone, whole[:, chosen]):
            raise ValueError(
                f"{self.name} changes the frames that its VAE decodes, so none can be chosen; leave decode_frames out."
            )

    def _measuring(self, found: list[FrameLayout]) -> Callable[[Any], Decode] | None:
        return measuring(self.name, found) if has_decoder(getattr(self.pipeline, "vae", None)) else None

    def _dry_run(
        self, columns: dict[str, list[Any]], generators: list[torch.Generator], texts: dict[str, list[Any]], *, guided: bool
    ) -> Recording:
        """Run the call up to its loop, record its preparing methods, and set the grid."""
        arguments = self.arguments(columns, len(generators), guided=guided)
        probe = make_probe(self._probe_class, self.scheduler, visit=None)
        kept, recording = self._calls.up_to_loop(probe, arguments, generators, texts)
        source = self._calls.call.source
        if kept is None or source not in recording.returns:
            raise ValueError(
                f"{self.name} does not loop over scheduler.timesteps in its own __call__ after {source}, so its loop "
                f"cannot be stopped before the first step; pass a pipeline that does."
            )
        if len(probe.streams) > 1 and not self._state_is_found:
            raise self._not_one_chain("find_state, which finds what they step, was not called or cannot do it")
        self.num_inference_steps = len(self.scheduler.timesteps)
        self._first = self.num_inference_steps - len(kept)
        if not torch.equal(kept, self.timesteps):
            raise ValueError(
                f"{self.name} stops its loop before the last step, where the latents are not data yet; leave out denoising_end, "
                f"timesteps and whatever else cuts the grid."
            )
        return recording
