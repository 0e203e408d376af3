"""What `transformers.Trainer` must be told about a diffusers pipeline: devices, batches, saving, resuming, evaluation."""

from __future__ import annotations

import contextlib
import copy
import math
import time
import uuid
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import save_fsdp_optimizer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from tqdm.auto import tqdm
from transformers import TrainerControl, TrainerState
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from ..data.columns import one_row, repeat_rows, rows_of
from ..data.given_datasets import eval_datasets_of, require_columns
from ..guidance import Guidance
from ..hub import save_pipeline
from ..model.devices import text_encoders_on
from ..model.fingerprint import base_fingerprint
from ..model.lora import ADAPTER, WEIGHTS_NAME, load_lora, save_lora
from ..model.sharding import from_first_process, spread_like, whole_network
from ..pictures.grid import image_grid, save_grid
from ..pictures.pixels import drawable
from ..pictures.samples import SampleImages
from ..pictures.trackers import spare_training, to_trackers, warn_if_lost
from .checkpoint import (
    checkpoint_to_resume,
    discard_leftovers,
    is_of,
    last_written,
    newest_of,
    require_whole,
    rotate,
    whole_files,
    whole_folder,
)
from .checks import require_prompts
from .evaluation import evaluate_rows
from .interrupt import interruptible
from .lock import only_trainer
from .parallel import compile_networks, require_fsdp2, round_in_network_alone
from .publishing import PublishingTrainer
from .run_record import RunFacts, RunRecord, adapter_facts, facts_to_go_on, settings_of, versions
from .sample_log import SampleLog, summarise
from .updates import UpdateCount

__all__ = ["PipelineTrainer"]

logger = logging.get_logger(__name__)


class PipelineTrainer(PublishingTrainer):
    """A `Trainer` of a pipeline's denoiser that knows no loss: the habits of the host, kept for another kind of model."""

    control: TrainerControl
    guidance: Guidance
    _clock: tuple[float, int] = (0.0, 0)  # seconds and evaluations at the last log; set at the start of training
    _updates: UpdateCount  # of this call of `train`
    _dropped = False  # the update under way
    _scale = 1.0  # of the gradient scaler, before the optimizer's step
    _run_facts: RunFacts  # from the start of training on
    _run_id: str | None = None
    _constant: tuple[str, str | None] | None = None  # fingerprint of the base, and the class of an optimizer that the user made
    _finished = False  # whether the checkpoint that training starts from has all its updates
    _columns: Collection[str] = ()  # of the first row; set at the start of training

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        spare_training(self.callback_handler.callbacks)

    def add_callback(self, callback: Any) -> None:
        """The host's; what a tracker cannot write is a warning."""
        super().add_callback(callback)
        spare_training(self.callback_handler.callbacks)

    # ---------------------------------------------------------------------------------------------------------- several devices

    def create_accelerator_and_postprocess(self) -> None:
        """The host's, then what compilation and FSDP must do otherwise for a network inside a pipeline."""
        super().create_accelerator_and_postprocess()
        compile_networks(self.denoiser, self.args, self.accelerator)
        if self.is_fsdp_enabled:
            plugin = self.accelerator.state.fsdp_plugin
            require_fsdp2(plugin)
            round_in_network_alone(self.denoiser, plugin, self.accelerator)

    def _backward(self, loss: Tensor) -> None:
        """The host's, of a loss that has its share of the update already."""
        self.accelerator.backward(loss, **({"scale_wrt_gas": False} if self.is_deepspeed_enabled else {}))

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Of all processes: under FSDP, older torch makes a number of this process's share, and that would be logged."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    # --------------------------------------------------------------------------------------------------------------- batches

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        """Number the images of an update across micro-batches and processes, in the order one process would see them."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        for columns in batches if self._columns else ():
            require_columns(one_row(columns), self._columns)
        if len(batches) < num_batches:  # a stream has ended: without its last micro-batch no update is made of the others
            batches = []
        repeated = [repeat_rows(columns, self.args.num_generations) for columns in batches]
        sizes = [rows_of(columns) for columns in repeated]
        inputs = []
        for i, columns in enumerate(repeated):
            first = sum(sizes[:i]) * self.args.world_size + self.args.process_index * sizes[i]
            last = i == len(repeated) - 1
            inputs.append({"columns": columns, "first_image": first, "share": sizes[i] / sum(sizes), "ends_update": last})
        return inputs, items

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["prompt"]  # Trainer would look for forward's arguments among the dataset's columns

    # ---------------------------------------------------------------------------------------------------------------- saving

    @property
    def _weights_name(self) -> str:
        """File or folder of a checkpoint that holds what was trained."""
        return self.replay.component if self.denoiser.base_adapters is None else WEIGHTS_NAME

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the LoRA that `pipeline.load_lora_weights(output_dir)` reads, or the whole pipeline with its own scheduler.

        Raises:
            ValueError: if the network is not as it was trained, its adapter taken away or set to another strength, or if a weight
                is NaN or infinite; what lies in the folder stays as it is.
        """
        self.denoiser.state.require_adapter()
        self._require_finite_weights()
        with whole_files(Path(output_dir or self.args.output_dir), self.args.should_save, self._wait) as partial:
            if self.denoiser.base_adapters is not None:
                self._write_weights(partial)
            elif (network := whole_network(self.denoiser.network, self.args.should_save)) is not None:
                pipeline = copy.copy(self.pipeline)
                pipeline.__dict__[self.replay.component] = network
                save_pipeline(partial, pipeline)
        if not _internal_call and output_dir is None:
            with warn_if_lost("README.md could not be written"):
                self.create_model_card()
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _write_weights(self, folder: Path) -> None:
        """Every process must call this: FSDP spreads the weights over all of them."""
        if self.denoiser.base_adapters is not None:
            save_lora(self.pipeline, self.replay.component, folder, write=self.args.should_save)
        elif (network := whole_network(self.denoiser.network, self.args.should_save)) is not None:
            network.save_pretrained(folder / self.replay.component)

    def _wait(self) -> None:
        self.accelerator.wait_for_everyone()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        # The host would add the weights of the base and of its frozen copy.
        save_fsdp_optimizer(self.accelerator.state.fsdp_plugin, self.accelerator, self.optimizer, self.model, output_dir)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """The host's checkpoint, except that a folder `checkpoint-N` is whole or absent, and that the weights are ours."""
        self.denoiser.state.require_adapter()
        run_dir = Path(self._get_output_dir(trial=trial))
        folder = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        self._find_best(run_dir, written=folder)
        with whole_folder(folder, self.args.should_save, self._wait) as partial:
            self._write_weights(partial)
            if not self.args.save_only_model:
                self._save_optimizer_and_scheduler(str(partial))
                self._save_scaler(str(partial))
                self._save_rng_state(str(partial))
            if self.args.should_save:
                self._write_state(partial)
            self._wait()  # for the files of the other processes
            if self.args.should_save:
                RunRecord.write(partial, self._run_facts, after=last_written(run_dir))
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder))
        if self.args.should_save:
            rotate(run_dir, self.args.save_total_limit, folder, self.state.best_model_checkpoint)

    def _find_best(self, run_dir: Path, written: Path | None = None) -> None:
        """Where this run's best checkpoint lies now: the folder may have been moved since its path was noted.

        Args:
            written: the checkpoint that is being written.
        """
        best = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
        if best == written or is_of(best, self._run_facts.run):
            self.state.best_model_checkpoint = str(best)

    def newest_checkpoint(self) -> Path | None:
        """The last one that this run has written, before an interruption too; `None` if there is none."""
        return None if self._run_id is None else newest_of(Path(self.args.output_dir), self._run_id)

    def _write_state(self, folder: Path) -> None:
        """Progress, and what the callbacks want to remember."""
        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                name, state = type(callback).__name__, callback.state()
                if isinstance(self.state.stateful_callbacks[name], list):
                    self.state.stateful_callbacks[name].append(state)
                else:
                    self.state.stateful_callbacks[name] = state
        self.state.save_to_json(str(folder / TRAINER_STATE_NAME))

    # -------------------------------------------------------------------------------------------------------------- resuming

    def train(
        self, resume_from_checkpoint: str | bool | None = None, trial: Any = None, ignore_keys_for_eval: list[str] | None = None
    ) -> Any:
        """`transformers.Trainer.train`. Goes on bit for bit from a checkpoint; `True` takes the newest in `output_dir`.

        With `save_on_interrupt`, Ctrl-C and SIGTERM end it by `KeyboardInterrupt` or `SystemExit`, after a checkpoint.

        Raises:
            ValueError: before any update for bad input, for another trainer at work in `output_dir`, and where there is no
                checkpoint to go on from, or it is damaged or of another network; when a weight becomes NaN or infinite, before
                that is saved; after 20 dropped updates in a row; and at the end if no update was made.
        """
        self.denoiser.state.require_trainable(None if self.is_deepspeed_enabled else self.optimizer)
        with contextlib.ExitStack() as held:
            lock = only_trainer(Path(self.args.output_dir))
            from_first_process(lambda: held.enter_context(lock))
            return self._train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def _train(self, resume_from_checkpoint: str | bool | None, trial: Any, ignore_keys_for_eval: list[str] | None) -> Any:
        run_dir = Path(self.args.output_dir)
        plain = not (self.is_fsdp_enabled or self.is_deepspeed_enabled or self.args.save_only_model)
        needed = [self._weights_name, TRAINER_STATE_NAME] + (["optimizer.pt", "scheduler.pt"] if plain else [])
        if self.args.should_save:
            discard_leftovers(run_dir)
        self._wait()
        facts = self._facts()

        def choose() -> tuple[str | None, RunFacts]:
            folder = checkpoint_to_resume(resume_from_checkpoint, run_dir, needed)
            return folder, facts if folder is None else facts_to_go_on(Path(folder), facts)

        checkpoint, self._run_facts = from_first_process(choose)
        self._run_id = self._run_facts.run
        self._finished = checkpoint is not None and self._has_all_updates(Path(checkpoint))
        if not self._finished:  # otherwise nothing is evaluated
            self._check_before_training()
            if checkpoint is None and self.state.global_step == 0:  # else it is the base no more, and was probed before
                self._probe_before_training()
        self._clock = (time.perf_counter(), self.denoiser.evaluations)
        self._evaluated, self._updates = None, UpdateCount()
        with interruptible(self) if self.args.save_on_interrupt else contextlib.nullcontext():
            output = super().train(checkpoint, trial, ignore_keys_for_eval)
        if self._finished:  # the host's mean over no update is 0, which looks like a loss
            return output._replace(training_loss=math.nan, metrics=output.metrics | {"train_loss": math.nan})
        self._updates.require_one(self.state, self._images_of_an_update)
        return output

    @property
    def _images_of_an_update(self) -> int:
        """On all processes together."""
        rows = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return rows * self.args.num_generations

    def _facts(self) -> RunFacts:
        """Of a new run with this network and these settings."""
        network, base_adapters = self.denoiser.network, self.denoiser.base_adapters
        if self._constant is None:  # later FSDP has divided the weights, and accelerate has wrapped the optimizer
            base = base_fingerprint(network if self.denoiser.frozen is None else self.denoiser.frozen, base_adapters)
            self._constant = base, type(self.optimizer).__name__ if self.optimizer is not None else None
        base, optimizer = self._constant
        adapter = None if base_adapters is None else adapter_facts(network.peft_config[ADAPTER].to_dict())
        settings = settings_of(self.args, type(self).__name__, optimizer, self.reward.names)
        return RunFacts(uuid.uuid4().hex, settings, adapter, base, versions())

    def _has_all_updates(self, checkpoint: Path) -> bool:
        """Whether a run that goes on from here is over."""
        made = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME)).global_step
        asked = self.args.max_steps
        if asked <= 0:  # by epochs
            *_, asked = self.set_initial_training_values(self.args, self.get_train_dataloader())
        if made >= asked and self.is_world_process_zero():
            logger.warning(f"{checkpoint} has made all {asked} updates of this run; nothing is trained.")
        return made >= asked

    def _run_epoch(self, **kwargs: Any) -> None:
        """The host's; it would look only after an update whether that was the last one."""
        if self._finished:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(**kwargs)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        """The host's, without its clean-up beside the best checkpoint.

        With `save_total_limit=1` it would delete the last one, from which a finished run is known to be finished, and every
        folder whose name begins like one, such as a "checkpoint-7-keep" of the user's.
        """
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            return super()._finalize_training(*args, **kwargs)
        finally:
            self.args.save_total_limit = limit

    def _evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """The host's, of training; the one that `eval_on_start` asks for is not repeated when training is over."""
        return {} if self._finished else super()._evaluate(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """The host's, without its summary of a training of no update."""
        if not (self._finished and "train_loss" in logs):
            super().log(logs, start_time)

    def _load_callback_state(self) -> None:
        """The host's, when it has read its own state, and has forgotten a best checkpoint that was moved."""
        super()._load_callback_state()
        self._find_best(Path(self.args.output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        network, folder = self.denoiser.network, Path(resume_from_checkpoint)
        if self.denoiser.base_adapters is None:
            saved = type(network).from_pretrained(folder / self.replay.component, dtype=network.dtype)
            network.load_state_dict(spread_like(saved.state_dict(), network.state_dict()))
        else:
            load_lora(network, self.replay.component, folder)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        groups = [set(group) for group in self.optimizer.param_groups]
        kind = type(getattr(self.optimizer, "optimizer", self.optimizer)).__name__
        other = ValueError(
            f"{kind} cannot go on from the optimizer's state in {checkpoint}; resume with the optimizer that saved it."
        )
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        except ValueError as error:  # its parameters are grouped otherwise
            raise other from error
        # torch loads any state, and would miss what an optimizer of another class needs only in the first update.
        if any(before - set(after) for before, after in zip(groups, self.optimizer.param_groups, strict=True)):
            raise other

    def _load_best_model(self) -> None:
        folder = Path(self.state.best_model_checkpoint)
        from_first_process(lambda: require_whole(folder, self._weights_name))
        self._load_from_checkpoint(str(folder))

    def _check_before_training(self) -> None:
        raise NotImplementedError

    def _probe_before_training(self) -> None:
        raise NotImplementedError

    # ------------------------------------------------------------------------------------------------------------ evaluation

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Sample the prompts with the pipeline's own scheduler; report the rewards of what a user would see, and their price.

        Args:
            eval_dataset: rows as in training, a dict of several datasets, whose names become part of the metrics' names, or the
                name of one in the trainer's own dict; the trainer's own when not given.
            ignore_keys: unused.
            metric_key_prefix: what the metrics' names begin with.

        Returns:
            Means over the rows: `eval_reward`, `eval_reward_std`, `eval_rewards/<name>/mean` and `/std` (and
            `/missing`, a number of images), `eval_diversity`, `eval_saturated`, `eval_kl` or `eval_kl_unguided` in nats.

        Raises:
            TypeError, ValueError: if there is no dataset, or it is none; or the network is not as it was trained.
        """
        self.denoiser.state.require_adapter()
        if eval_dataset is not None:
            eval_dataset = self._eval_datasets(eval_dataset)
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if dataset is None:
            raise ValueError("there is no eval_dataset; pass one here or to the trainer.")
        if isinstance(dataset, dict):
            # By name where it is the trainer's own, as the host does: it keeps the workers of each name's loader.
            parts = {key: part if eval_dataset is not None else key for key, part in dataset.items()}
            evaluations = [self.evaluate(part, ignore_keys, f"{metric_key_prefix}_{key}") for key, part in parts.items()]
            return {name: value for metrics in evaluations for name, value in metrics.items()}
        samples, self._evaluated = self.measure(dataset)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in summarise(samples).items()}
        self.log(metrics)
        if self._evaluated is not None:
            self._show(metric_key_prefix, self._evaluated)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _eval_datasets(self, given: Any) -> Any:
        """Those, after their check, or the name of one that was checked in the constructor."""
        if isinstance(given, str) and isinstance(self.eval_dataset, dict) and given in self.eval_dataset:
            return given
        dataset = eval_datasets_of(given)
        if self.replay.arguments.takes_prompt:
            require_prompts(dataset, "eval_dataset")
        return dataset

    def measure(self, dataset: Any) -> tuple[dict[str, Tensor], SampleImages | None]:
        """Measurements of all rows, name → (N,), and the first images."""
        samples, pictures, first = SampleLog(), None, 0
        names: Collection[str] = ()
        batches = self.get_eval_dataloader(dataset)
        for columns in tqdm(batches, "evaluation", leave=False, disable=not self._shows_progress):
            names = names or columns.keys()
            require_columns(one_row(columns), names)
            rows = rows_of(columns)
            offset = first * self.args.world_size + self.args.process_index * rows
            with self._text_encoders():
                measured, images = evaluate_rows(self.denoiser, self.guidance, self.reward, self.args, columns, offset)
            if pictures is None:
                repeated = repeat_rows(columns, self.args.num_generations_eval)
                pictures = SampleImages.first(self.args.num_images_to_log, images, repeated, measured["reward"].flatten())
            for name, values in measured.items():
                # Drops the rows that fill up the last batch of several processes.
                samples.add(name, self.accelerator.gather_for_metrics(values))
            first += rows
        return samples.drain(), pictures

    def _rate(self) -> float:
        """Denoiser evaluations a second since the last log, one an image and step, all processes."""
        now, count = time.perf_counter(), self.denoiser.evaluations
        then, before = self._clock
        self._clock = (now, count)
        return (count - before) / (now - then) * self.args.world_size

    @property
    def _shows_progress(self) -> bool:
        return not self.args.disable_tqdm and self.is_local_process_zero()

    def _text_encoders(self) -> contextlib.AbstractContextManager[None]:
        """They are on the device only while prompts are encoded, if asked so."""
        return text_encoders_on(self.pipeline, self.args.device) if self.args.offload_text_encoders else contextlib.nullcontext()

    def _show(self, name: str, pictures: SampleImages) -> None:
        """A grid in `output_dir/samples/` and in the trackers."""
        if not (self.args.log_images and self.is_world_process_zero() and drawable(pictures.images)):
            return
        grid, step = image_grid(pictures), self.state.global_step
        with warn_if_lost(f"samples/{name}-{step:06d}.png could not be written"):
            save_grid(grid, Path(self.args.output_dir) / "samples", name, step)
        to_trackers(self.callback_handler.callbacks, grid, f"{name}/samples", step)

    def _gradient_is_finite(self, model: nn.Module) -> bool:
        """Whether the weights survive this update; with a gradient scaler, which looks itself, `True`."""
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        return self.accelerator.scaler is not None or _finite_norm(gradients, 2.0)  # an optimizer squares them

    def _require_finite_weights(self) -> None:
        """Raise ValueError, on every process, if a trained weight is NaN or infinite."""
        if not _finite_norm([p.detach() for p in self.denoiser.network.parameters() if p.requires_grad], torch.inf):
            raise ValueError(
                f"weights are NaN or infinite after update {self.state.global_step + self.is_in_train} and are not saved; lower "
                f"learning_rate, and start again or from a checkpoint, where they are finite."
            )

    def _note_scale(self) -> None:
        if self.accelerator.scaler is not None:
            self._scale = self.accelerator.scaler.get_scale()

    def _step_was_skipped(self) -> bool:
        """Whether the optimizer has not moved, because a gradient overflowed in mixed precision."""
        if self.accelerator.scaler is None:
            return bool(self.accelerator.optimizer_step_was_skipped)
        # accelerate does not notice where a fused optimizer skips its step itself; the scale falls in any case.
        return bool(self.accelerator.scaler.get_scale() < self._scale)

    def _drop_gradients(self, model: nn.Module) -> None:
        """Make the coming step of the optimizer do nothing."""
        self._dropped = True
        if self.is_world_process_zero():
            logger.warning(f"update {self.state.global_step + 1} is skipped: rewards or gradients are NaN or infinite.")
        if self.accelerator.scaler is None:
            model.zero_grad()
        else:  # it insists on gradients, and skips the step itself when one overflows
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.grad.fill_(torch.inf)


def _finite_norm(tensors: list[Tensor], order: float) -> bool:
    """The same on every process, of tensors that are equal there or divided among them."""
    norm = nn.utils.get_total_norm(tensors, norm_type=order)
    return bool((norm.full_tensor() if isinstance(norm, DTensor) else norm).isfinite())
