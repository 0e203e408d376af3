"""The base trainer: what `transformers.Trainer`, "the host", must do differently for a diffusers pipeline, whatever the loss."""

from __future__ import annotations

import contextlib
import copy
import math
import uuid
from collections.abc import Collection, Iterator
from functools import cached_property
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
from ..pictures.samples import SampleImages
from ..pictures.trackers import spare_training, warn_if_lost
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
from .counts import Counts
from .evaluation import evaluate_rows
from .host_messages import said_once
from .interrupt import interruptible
from .lock import only_trainer
from .parallel import compile_networks, require_fsdp2, round_in_network_alone
from .publishing import PublishingTrainer
from .run_record import RunFacts, RunRecord, adapter_facts, facts_to_go_on, settings_of, versions
from .sample_log import SampleLog, summarise
from .shown import show
from .updates import require_finite_weights

__all__ = ["PipelineTrainer"]

logger = logging.get_logger(__name__)


class PipelineTrainer(PublishingTrainer):
    """Base trainer for a diffusers denoiser: devices, batches, checkpoints, resuming, evaluation. Subclasses define the loss.

    State besides the host's `state`: `_counts` holds the counters of this call of `train`; `_shown` the images of the last
    rollout and evaluation; `_run` the facts of this run; `_finished` whether it was complete already; `_columns` the columns of
    its rows. `RewardTrainer` adds what it measures before the first update. The Hub is in `PublishingTrainer`.
    """

    control: TrainerControl
    guidance: Guidance  # set by a subclass's constructor before it calls this one

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        spare_training(self.callback_handler.callbacks)
        self._counts = Counts(self.accelerator, self.denoiser)
        self._run: RunFacts | None = None  # of the run that the last call of `train` began or resumed
        self._finished = False  # whether the checkpoint that training resumes from has all updates of the run
        self._columns: Collection[str] = ()  # names of the first row's columns, known once training has started

    def add_callback(self, callback: Any) -> None:
        """As in `Trainer`, but a tracker that cannot write only causes a warning."""
        super().add_callback(callback)
        spare_training(self.callback_handler.callbacks)

    # ---------------------------------------------------------------------------------------------------------- several devices

    def create_accelerator_and_postprocess(self) -> None:
        """As in `Trainer`, then adapt compilation and FSDP to a network inside a pipeline."""
        super().create_accelerator_and_postprocess()
        compile_networks(self.denoiser, self.args, self.accelerator)
        if self.is_fsdp_enabled:
            plugin = self.accelerator.state.fsdp_plugin
            require_fsdp2(plugin)
            round_in_network_alone(self.denoiser, plugin, self.accelerator)

    def _backward(self, loss: Tensor) -> None:
        """Backward of a loss that is already weighted by its share of the update: it must not be divided again."""
        self.accelerator.backward(loss, **({"scale_wrt_gas": False} if self.is_deepspeed_enabled else {}))

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The gradient norm over all processes; under FSDP, older torch returns a DTensor, and the host logs its local part."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    # --------------------------------------------------------------------------------------------------------------- batches

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        """Number the images of an update over micro-batches and processes, in the order in which one process would see them."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        for columns in batches if self._columns else ():
            require_columns(one_row(columns), self._columns)
        if len(batches) < num_batches:  # the dataset ended within this update, which is dropped
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
        self._signature_columns = ["prompt"]  # else `Trainer` looks for the arguments of `forward` among the dataset's columns

    # ---------------------------------------------------------------------------------------------------------------- saving

    @property
    def _weights_name(self) -> str:
        """Name of the file or folder with the trained weights in a checkpoint."""
        return self.replay.component if self.denoiser.base_adapters is None else WEIGHTS_NAME

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the LoRA, or the whole pipeline with its own scheduler; nothing in a dry run.

        `pipeline.load_lora_weights(output_dir)` loads the LoRA. If the pipeline has no such method, its network loads it:
        `network.load_lora_adapter(output_dir, prefix=None, weight_name="pytorch_lora_weights.safetensors")`. The model card says
        which of the two it is.

        Args:
            output_dir: `args.output_dir` when not given.

        Raises:
            ValueError: if the adapter was removed, disabled or rescaled, or if a weight is NaN or infinite. The folder is not
                changed then.
        """
        self.denoiser.state.require_adapter()
        require_finite_weights(self.denoiser.network, self.state.global_step + self.is_in_train)
        if self.args.dry_run:
            return
        with whole_files(Path(output_dir or self.args.output_dir), self.args.should_save, self._wait) as partial:
            if self.denoiser.base_adapters is not None:
                self._write_weights(partial)
            elif (network := whole_network(self.denoiser.network, self.args.should_save)) is not None:
                pipeline = copy.copy(self.pipeline)
                pipeline.__dict__[self.replay.component] = network
                save_pipeline(partial, pipeline, self.hub_model_id)
        if not _internal_call and output_dir is None:
            with warn_if_lost("README.md could not be written"):
                self.create_model_card()
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _write_weights(self, folder: Path) -> None:
        """Write the trained weights. All processes must call this, because FSDP divides the weights among them."""
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
        # The host would also save the weights of the base and of its frozen copy.
        save_fsdp_optimizer(self.accelerator.state.fsdp_plugin, self.accelerator, self.optimizer, self.model, output_dir)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As in `Trainer`, but the folder `checkpoint-N` is complete or absent, and holds the trained weights only."""
        self.denoiser.state.require_adapter()
        assert self._run is not None  # checkpoints are written within `train` only
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
                self._write_memory(partial)
            self._wait()  # the record hashes the files of all processes
            if self.args.should_save:
                RunRecord.write(partial, self._run, after=last_written(run_dir))
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder))
        if self.args.should_save:
            rotate(run_dir, self.args.save_total_limit, folder, self.state.best_model_checkpoint)

    def _find_best(self, run_dir: Path, written: Path | None = None) -> None:
        """Update the path of this run's best checkpoint: the output folder may have been moved since it was stored.

        Args:
            run_dir: where the checkpoints are now.
            written: the checkpoint that is being written.
        """
        best = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
        if best == written or (self._run is not None and is_of(best, self._run.run)):
            self.state.best_model_checkpoint = str(best)

    def newest_checkpoint(self) -> Path | None:
        """The newest checkpoint of this run, including those from before it was resumed; `None` if there is none."""
        return None if self._run is None else newest_of(Path(self.args.output_dir), self._run.run)

    def _write_state(self, folder: Path) -> None:
        """Write the trainer's state with the states of its callbacks."""
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
        """Train, as `transformers.Trainer.train` does. A resumed run gives the same bits as one that was not interrupted.

        With `save_on_interrupt`, Ctrl-C and SIGTERM write a checkpoint and then raise `KeyboardInterrupt` or `SystemExit`.

        Args:
            resume_from_checkpoint: folder of a checkpoint, or `True` for the newest in `output_dir`.

        Raises:
            ValueError: before the first update, if an argument is bad, another trainer uses `output_dir`, or the checkpoint to
                resume from is missing, damaged or of another network. Later, if a weight becomes NaN or infinite (before it is
                saved), after 20 dropped updates in a row, and at the end if no update was made.
        """
        self.denoiser.state.require_trainable(None if self.is_deepspeed_enabled else self.optimizer)
        with contextlib.ExitStack() as held:
            lock = contextlib.nullcontext() if self.args.dry_run else only_trainer(Path(self.args.output_dir))
            from_first_process(lambda: held.enter_context(lock))
            held.enter_context(said_once())
            return self._train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def _train(self, resume_from_checkpoint: str | bool | None, trial: Any, ignore_keys_for_eval: list[str] | None) -> Any:
        run_dir = Path(self.args.output_dir)
        plain = not (self.is_fsdp_enabled or self.is_deepspeed_enabled or self.args.save_only_model)
        needed = [self._weights_name, TRAINER_STATE_NAME] + (["optimizer.pt", "scheduler.pt"] if plain else [])
        if self.args.should_save and not self.args.dry_run:
            discard_leftovers(run_dir)
        self._wait()
        facts = self._facts()

        def choose() -> tuple[str | None, RunFacts]:
            folder = checkpoint_to_resume(resume_from_checkpoint, run_dir, needed)
            return folder, facts if folder is None else facts_to_go_on(Path(folder), facts)

        checkpoint, self._run = from_first_process(choose)
        self._finished = checkpoint is not None and self._has_all_updates(Path(checkpoint))
        if checkpoint is not None:
            self._read_memory(Path(checkpoint))
        if not self._finished:  # a finished run evaluates no network
            self._columns = self._check_before_training()
            self._find_scale_before_training()
            if checkpoint is None and self.state.global_step == 0:  # later the model is not the base, and was probed before
                self._probe_before_training()
        self._counts, self._shown.evaluated = Counts(self.accelerator, self.denoiser), None
        with interruptible(self) if self.args.save_on_interrupt else contextlib.nullcontext():
            output = super().train(checkpoint, trial, ignore_keys_for_eval)
        if self._finished:  # without an update the host reports a loss of 0, which looks like a result
            return output._replace(training_loss=math.nan, metrics=output.metrics | {"train_loss": math.nan})
        self._counts.updates.count.require_one(self.state, self._images_of_an_update)
        return output

    @property
    def _images_of_an_update(self) -> int:
        """Images of one update, over all processes."""
        rows = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return rows * self.args.num_generations

    def _facts(self) -> RunFacts:
        """The facts of a new run with this network and these settings."""
        base, optimizer = self._base_and_optimizer
        lora = self.denoiser.base_adapters is not None
        adapter = adapter_facts(self.denoiser.network.peft_config[ADAPTER].to_dict()) if lora else None
        settings = settings_of(self.args, type(self).__name__, optimizer, self.reward.names)
        return RunFacts(uuid.uuid4().hex, settings, adapter, base, versions())

    @cached_property
    def _base_and_optimizer(self) -> tuple[str, str | None]:
        """Fingerprint of the base's weights, and the class of an optimizer that the user passed.

        Cached at the first call of `train`: later, FSDP has divided the weights and accelerate has wrapped the optimizer.
        """
        base = self.denoiser.network if self.denoiser.frozen is None else self.denoiser.frozen
        optimizer = None if self.optimizer is None else type(self.optimizer).__name__
        return base_fingerprint(base, self.denoiser.base_adapters), optimizer

    def _has_all_updates(self, checkpoint: Path) -> bool:
        """Whether a run that resumes from this checkpoint has made all its updates."""
        made = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME)).global_step
        asked = self.args.max_steps
        if asked <= 0:  # by epochs
            *_, asked = self.set_initial_training_values(self.args, self.get_train_dataloader())
        if made >= asked and self.is_world_process_zero():
            logger.warning(f"{checkpoint} already has all {asked} updates of this run; nothing is trained.")
        return made >= asked

    def _run_epoch(self, **kwargs: Any) -> None:
        """As in `Trainer`, but a finished run makes no update; the host checks only after one whether it was the last."""
        if self._finished:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(**kwargs)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        """As in `Trainer`, but without deleting checkpoints at the end.

        With `save_total_limit=1` the host keeps the best checkpoint only. The last one must stay, because it shows that the run
        is finished. So must a user's folder like "checkpoint-7-keep", which the host would delete for its name.
        """
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            return super()._finalize_training(*args, **kwargs)
        finally:
            self.args.save_total_limit = limit

    def _evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """As in `Trainer`, but a finished run that is started again does not repeat the evaluation of `eval_on_start`."""
        return {} if self._finished else super()._evaluate(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in `Trainer`, but a finished run that is started again logs no summary of a training without updates."""
        if not (self._finished and "train_loss" in logs):
            super().log(logs, start_time)

    def _load_callback_state(self) -> None:
        """As in `Trainer`, which has just read its state; then find the best checkpoint again if the folder was moved."""
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
        other = ValueError(f"{kind} cannot load the optimizer's state in {checkpoint}; resume with the optimizer that saved it.")
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        except ValueError as error:  # the saved parameter groups are others
            raise other from error
        # torch loads the state of another optimizer class without an error, and fails only in the first update.
        if any(before - set(after) for before, after in zip(groups, self.optimizer.param_groups, strict=True)):
            raise other

    def _load_best_model(self) -> None:
        folder = Path(self.state.best_model_checkpoint)
        from_first_process(lambda: require_whole(folder, self._weights_name))
        self._load_from_checkpoint(str(folder))
        self._read_memory(folder)

    def _check_before_training(self) -> Collection[str]:
        """Checks of a subclass before any rollout. Returns the names of the first row's columns, which every row must have."""
        raise NotImplementedError

    def _write_memory(self, folder: Path) -> None:
        """Save what a subclass needs to resume, besides weights, optimizer and random state."""
        raise NotImplementedError

    def _read_memory(self, folder: Path) -> None:
        """Load what `_write_memory` saved in a checkpoint."""
        raise NotImplementedError

    def _find_scale_before_training(self) -> None:
        """Estimate λ, in a subclass whose settings ask for it."""
        raise NotImplementedError

    def _probe_before_training(self) -> None:
        """Measurements of a subclass on the base, when training starts from it."""
        raise NotImplementedError

    # ------------------------------------------------------------------------------------------------------------ evaluation

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Sample the dataset's prompts with the pipeline's own scheduler, as a user would, and report rewards, KL and diversity.

        Args:
            eval_dataset: a dataset as for the constructor; a dict of several, whose keys become part of the metrics' names; or
                the key of one in the trainer's own dict. When not given, the trainer's own.
            ignore_keys: unused.
            metric_key_prefix: what the metrics' names begin with.

        Returns:
            Means over the rows: `eval_reward`, `eval_reward_std`, `eval_rewards/<name>/mean` and `/std` (and
            `/missing`, a number of images), `eval_diversity`, `eval_saturated`, `eval_kl` or `eval_kl_unguided` in nats.

        Raises:
            TypeError, ValueError: if there is no dataset, its rows are not valid, or the adapter was removed, disabled or
                rescaled.
        """
        self.denoiser.state.require_adapter()
        if eval_dataset is not None:
            eval_dataset = self._eval_datasets(eval_dataset)
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if dataset is None:
            raise ValueError("there is no eval_dataset; pass one here or to the trainer.")
        if isinstance(dataset, dict):
            # The trainer's own datasets go by key, as in the host, which keeps one data loader with its workers for each key.
            parts = {key: part if eval_dataset is not None else key for key, part in dataset.items()}
            evaluations = [self.evaluate(part, ignore_keys, f"{metric_key_prefix}_{key}") for key, part in parts.items()]
            return {name: value for metrics in evaluations for name, value in metrics.items()}
        with said_once():
            samples, self._shown.evaluated = self.measure(dataset)
        if self.state.global_step == 0:
            self._shown.base = self._shown.evaluated
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in summarise(samples).items()}
        self.log(metrics)
        self._show(metric_key_prefix, self._shown.evaluated)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _eval_datasets(self, given: Any) -> Any:
        """Check the datasets given to `evaluate`; the key of one that the constructor checked is returned as it is."""
        if isinstance(given, str) and isinstance(self.eval_dataset, dict) and given in self.eval_dataset:
            return given
        dataset = eval_datasets_of(given)
        if self.replay.arguments.takes_prompt:
            require_prompts(dataset, "eval_dataset")
        return dataset

    def measure(self, dataset: Any) -> tuple[dict[str, Tensor], SampleImages | None]:
        """Measurements of all rows, name → (N,), and the first images to show."""
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

    @property
    def _shows_progress(self) -> bool:
        return not self.args.disable_tqdm and self.is_local_process_zero()

    def _text_encoders(self) -> contextlib.AbstractContextManager[None]:
        """Within this context the text encoders are on the device; with `offload_text_encoders` they leave it afterwards."""
        if not self.args.offload_text_encoders:
            return contextlib.nullcontext()
        return text_encoders_on(self.pipeline, self.args.device, self.replay.denoisers)

    def _show(self, name: str, pictures: SampleImages | None) -> None:
        """Save a grid of the images in `output_dir/samples/` and send it to the trackers, on the main process."""
        if self.is_world_process_zero() and pictures is not None:
            show(pictures, name, self.state.global_step, Path(self.args.output_dir), self.callback_handler.callbacks)
