"""Replay of a diffusers pipeline: its own `__call__` as prepare → x_0, predict → m(x, t_k), decode → images.

Every pipeline hands its guided prediction to `scheduler.step`. With a scheduler that catches it (`stand_in.py`), the pipeline's
call, taken out of `torch.no_grad`, is the differentiable function that Adjoint Matching needs, whatever the network, its
guidance and its latents look like. Text encodings and starting latents are recorded once and replayed.
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
        pipeline: with a transformer or a UNet, modular or not; of its state only the modes of its denoisers are set (no dropout).
        scheduler: memoryless scheduler that the pipeline's code sees in place of its own; `prepare` sets its tables.
        num_inference_steps: K.
        guidance_scale: classifier-free guidance, 1 for none, or the scale that a distilled network takes as an input.
        pipeline_kwargs: further arguments of every call (height, max_sequence_length, …).
        component: name of the denoiser to train; `None` for the one that diffusers puts LoRA on.
        chooses_frames: whether `decode` is going to be asked for some frames of a video only.

    Attributes:
        component: the denoiser's name in the pipeline.
        denoisers: names of all networks that may predict; a pipeline may have a second one for its later steps.
        arguments: the arguments of the pipeline's `__call__`.
        num_inference_steps: K of the last `prepare`: as asked for, or the length of `sigmas` where these are given.
        guides_itself: whether guidance acts that no scale switches off; of `find_guidance`.
        guidance_is_distilled: whether the network is asked for the predictions of a guided one, by a scale above 1.
        frame_layout: which frames the VAE makes of which latent frames; of `find_frames`, without which it is `None`.

    Raises:
        TypeError: if `pipeline` is no diffusers pipeline.
        ValueError: if it cannot be replayed, or does not take an argument given here.
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
        self._origins = {0: Origin(self._calls.call.source)}  # of what is stepped by the scheduler and its copies, by number
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
        """How a modular pipeline is called; `None` for others."""
        call = self._calls.call
        return call if isinstance(call, ModularCall) else None

    def not_loaded(self, columns: dict[str, list[Any]]) -> list[str]:
        """Names of components that a modular pipeline's blocks may need for these columns, and that have no weights yet."""
        if self.modular_call is None:
            return []
        arguments = self.arguments(columns, len(next(iter(columns.values()), [None])))
        return self.modular_call.not_loaded(self.pipeline, arguments)

    @property
    def exchanges_processors(self) -> bool:
        """Whether the attention processors of the loop are not those of the network."""
        return self._calls.call.exchanges_processors

    @property
    def runs_safety_checker(self) -> bool:
        """Whether its call hands images to a safety checker, with or without gradient."""
        return self._calls.call.insists_on_safety_checker and self.pipeline.safety_checker is not None

    @property
    def makes_audio(self) -> bool:
        """Whether it makes a sound with its videos."""
        return AUDIO in self._calls.call.outputs[1:]

    @property
    def embeds_guidance(self) -> bool:
        """Whether the guidance scale is an input of the (distilled) network, a condition rather than guidance."""
        return bool(getattr(self.pipeline, self.component).config.get("guidance_embeds", False))

    @contextmanager
    def on(self, scheduler: Any) -> Iterator[None]:
        """Within this context another memoryless scheduler of this class stands in, with its grid until the next `prepare`."""
        own, self.scheduler = self.scheduler, scheduler
        try:
            yield
        finally:
            self.scheduler = own

    # ------------------------------------------------------------------------------------------------- the grid in use

    @property
    def timesteps(self) -> Tensor:
        """Of the steps that the pipeline takes, shape (K',): K' = K, or fewer where it starts below full noise."""
        return self.scheduler.timesteps[self._first :]

    @property
    def stds(self) -> Tensor:
        """s_k of these steps, shape (K',), float64, CPU."""
        return self.scheduler.stds[self._first :]

    @property
    def starts_below_noise(self) -> bool:
        """Whether the first steps are left out, as image-to-image pipelines do: x_0 then holds a part of the image."""
        return self._first > 0

    @property
    def gains(self) -> Tensor:
        """g_k of these steps, as the scheduler's, shape (K',)."""
        return self.scheduler.gains[self._first :]

    @property
    def posterior_stds(self) -> Tensor:
        """Of these steps, as the scheduler's, shape (K',)."""
        return self.scheduler.posterior_stds[self._first :]

    @property
    def levels(self) -> Tensor:
        """α_k and β_k of these steps, as the scheduler's, shape (2, K')."""
        return self.scheduler.levels[:, self._first :]

    @property
    def times(self) -> Tensor:
        """t_k of these steps, as the scheduler's, shape (K',)."""
        return self.scheduler.times[self._first :]

    def transition(self, model_output: Tensor, x: Tensor, index: int) -> Transition:
        """Law of the next state at step `index` of these."""
        return self.scheduler.transition(model_output, x, self._first + index)

    def noised(self, clean: Tensor, noise: Tensor, index: int) -> Tensor:
        """Clean data at the noise level of step `index` of these."""
        return self.scheduler.noised(clean, noise, self._first + index)

    def toward(self, clean: Tensor, x: Tensor, index: int) -> Tensor:
        """The mean that step `index` of these has from x when the clean prediction is `clean`."""
        return self.scheduler.toward(clean, x, self._first + index)

    def clean(self, mean: Tensor, x: Tensor, index: int) -> Tensor:
        """The clean prediction that gives step `index` of these this mean."""
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
            columns: a list of B values for each per-sample argument of the pipeline's `__call__`, "prompt" among them; other
                columns are left alone.
            generators: B generators, one a sample, so that a sample's x_0 does not depend on the batch it is in.
            guided, unguided: which of both `predict` is going to be asked for. A text is encoded once for both.

        Returns:
            x_0 of shape (B, …) in float32 (float64 for a float64 pipeline), and the conditioning for `predict` and `decode`.

        Raises:
            ValueError: if the columns do not fit the pipeline's call, or its loop cannot be followed.
        """
        # Some pipelines prepare differently without guidance, so each is a dry run of its own, with the same random numbers.
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
        """m(x, t_index): what the pipeline hands to `scheduler.step` when its loop is at `index` with the latents x.

        Differentiable in x and in the denoiser's parameters; evaluates the denoiser as often as the pipeline does in one step.

        Args:
            x: shape (B, …) as `prepare` gives it; rounded to the pipeline's own dtype on the way in.
            index: step of the grid, 0 ≤ index < K'.
            conditioning: of the last `prepare` (the scheduler's tables are those of the last one).
            guided: False sets the guidance scales to none; the embedding of a distilled guidance stays.
            denoiser: module to run in place of the pipeline's: a frozen copy, a wrapper around the pipeline's own, …
            grid: the scheduler with another level at `index`, of its `ending_at`; `None` for the scheduler itself.

        Returns:
            The model output, shape (B, …), in the dtype that the pipeline computes it in.

        Raises:
            ValueError: if the index is not on the grid or x has another shape than x_0.
        """
        steps = len(self.timesteps)
        if not 0 <= index < steps:
            raise ValueError(f"index={index} is not on the grid; pass 0 to {steps - 1}.")
        # Counted from the end: a pipeline that leaves out the first steps moves the index, but not the distance to the end.
        given = grid or self.scheduler, (index - steps,), tuple(self._origins)
        probe = make_probe(self._probe_class, *given)
        recording, returns = conditioning.recording(guided), conditioning.returns_with(x, guided)
        with suppress(ReplayStop):
            self._calls.replayed(probe, recording, conditioning.generators, returns, x.device, denoiser)
        # A pipeline that carries its batch doubled for guidance hands it over like that.
        return joined([output[: len(x)] for output in self._captured(probe, index)])

    def _captured(self, probe: Any, index: int) -> list[Tensor]:
        """What was handed to the scheduler, or to each of several."""
        streams = [probe.streams[number] for number in self._origins if number < len(probe.streams)]
        captured = [stream.captured for stream in streams if stream.captured is not None]
        if not captured:
            raise ValueError(f"{self.name} does not call scheduler.step at step {index}; it cannot be replayed.")
        if len(captured) < len(self._origins):
            raise self._no_one_chain("one is called more often than another")
        return captured

    def decode(self, x: Tensor, conditioning: Conditioning, frames: Sequence[int] | None = None) -> Tensor:
        """Images of final latents x by the pipeline's own unpacking, VAE and post-processing; no denoiser evaluation.

        Args:
            x: shape (B, …), data.
            conditioning: as for `predict`.
            frames: numbers of the frames of a video that are wanted, ascending, after `find_frames`; `None` for all.

        Returns:
            Images (B, 3, H, W) in [0, 1], videos (B, F, 3, H, W) or waveforms (B, …) in the pipeline's dtype, differentiable in
            x (the pipeline clamps images: a saturated pixel has no gradient). The gradient is that of the whole decoding's same
            frames. After `find_frames` it takes one more forward pass, and the memory of one slice, where the decoder has slices.
        """
        return self.decode_media(x, conditioning, frames).images

    def decode_media(self, x: Tensor, conditioning: Conditioning, frames: Sequence[int] | None = None) -> Media:
        """As `decode`, with the sound where the pipeline makes one with its videos."""
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
        """An ordinary call of the pipeline, its own scheduler, the same arguments: what a user of the pipeline sees.

        Args:
            columns, generators: as for `prepare`; the generators also feed a stochastic scheduler.
            noise: step noise of the memoryless scheduler, which takes the place of the pipeline's own if they are given.
            guided: False sets the guidance scales to none.

        Returns:
            Images (B, 3, H, W) in [0, 1] (videos, waveforms as `decode`), without graph.
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
        """As `sample`, with the sound where the pipeline makes one with its videos."""
        if noise is None:
            scheduler = copy.deepcopy(self.pipeline.scheduler)
            if isinstance(scheduler, MemorylessStep):
                # Copies share their noise source. The user's own stays where it is: two calls then draw the same.
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
        """The pipeline's own, undisturbed `__call__` on the memoryless scheduler: what it makes, and what passed its steps.

        Args:
            stop_after: leave after so many steps, with nothing made.
            arguments: replace those of the call.

        Raises:
            ValueError: if the steps of several schedulers are not those of one.
        """
        recorder = make_recorder(self.scheduler, generators, stop_after)
        made, call = None, {**self.arguments(columns, len(generators), guided=guided), **arguments}
        with suppress(ReplayStop):
            made = self._calls.ordinary(recorder, call, generators)
        return made, self._steps_of(recorder)

    # ------------------------------------------------------------------------------- which network acts, where x lies

    def idle_steps(self, x: Tensor, conditioning: Conditioning, *, guided: bool) -> list[int]:
        """Steps at which another network than the trained one predicts; one evaluation a step where there are several.

        Args:
            x: any state, shape (B, …).

        Raises:
            ValueError: if these are all steps.
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
        """Whether the prediction depends on the timestep that its step goes to, as that of a distilled flow map does.

        One evaluation.

        Args:
            x: any state, shape (B, …), prediction: that of the first step for it.
        """
        grid = copy.copy(self.scheduler)
        grid.timesteps = grid.timesteps.clone()
        grid.timesteps[self._first + 1] = grid.timesteps[self._first]
        with torch.no_grad():
            return not torch.equal(self.predict(x, 0, conditioning, guided=guided, grid=grid), prediction)

    def find_guidance(self, x: Tensor, conditioning: Conditioning) -> None:
        """Find whether the call compares predictions though its guidance scales are none, as perturbed attention does.

        One evaluation. To be asked only where guidance may act in the loss: elsewhere the check at the start refuses it.

        Args:
            x: any state, shape (B, …).
        """
        with torch.no_grad(), counting_rows(*(getattr(self.pipeline, name) for name in self.denoisers)) as rows:
            self.predict(x, 0, conditioning)
        self.guides_itself = sum(rows) > len(x)

    def find_state(self, columns: dict[str, list[Any]], generators: list[torch.Generator], *, guided: bool = True) -> None:
        """Find what the state is: the prepared latents, a part of them, or several; one step of the pipeline, or a few.

        For pipelines that keep condition frames or channels in the same tensor, or unpack it before `scheduler.step` sees it: any
        selection and order of its elements is found. And for those that step further latents with copies of their scheduler,
        which a preparing method returned as they are. To be called before `prepare`.

        Raises:
            ValueError: if a copy of the scheduler steps something else.
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
                raise self._no_one_chain("what one of them steps is not what a prepare_… method returns")
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
        """What the pipeline's own call first hands to `step` of its scheduler, and of copies of it, by their numbers."""
        recorder = make_recorder(self.scheduler, generators, stop_after=1)
        with suppress(ReplayStop):
            self._calls.ordinary(recorder, arguments, generators, latents)
        self._steps_of(recorder)
        return {number: stream.record[0].sample for number, stream in enumerate(recorder.streams) if stream.record}

    def _steps_of(self, recorder: Any) -> list[RecordedStep]:
        try:
            return joined_steps(recorder)
        except ValueError as error:
            raise self._no_one_chain(str(error)) from None

    def _no_one_chain(self, why: str) -> ValueError:
        return ValueError(
            f"{self.name} steps several latents with copies of its scheduler that make no one chain, because {why}; use a "
            f"pipeline with one scheduler, or one whose schedulers step prepared latents in turns on one grid."
        )

    def find_frames(self, x: Tensor, conditioning: Conditioning) -> None:
        """Find which frames of a video its VAE can decode without the others, by a few decodings without gradient.

        Args:
            x: any state, shape (B, …).

        Raises:
            ValueError: if there are no frames to choose from, or they cannot be told apart.
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
        """The call up to its loop, with what its preparing methods return."""
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
            raise self._no_one_chain("find_state, which finds what they step, was not called or cannot do it")
        self.num_inference_steps = len(self.scheduler.timesteps)
        self._first = self.num_inference_steps - len(kept)
        if not torch.equal(kept, self.timesteps):
            raise ValueError(
                f"{self.name} stops its loop before the last step, where the latents are not data yet; leave out denoising_end, "
                f"timesteps and whatever else cuts the grid."
            )
        return recording
