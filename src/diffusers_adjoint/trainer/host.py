"""The base trainer: what `transformers.Trainer` must be told about a pipeline, whatever the loss."""

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

    State besides the host's `state`: `_counts` is what this call of `train` has counted, made anew in `_train`; `_shown` the
    pictures of the last rollout and evaluation; `_run`, `_finished` and `_columns` which run this is and what its rows hold.
    `RewardTrainer` adds what it finds out before the first update. What concerns the Hub alone is in `PublishingTrainer`.
    """

    control: TrainerControl
    guidance: Guidance  # set by a subclass's constructor before it calls this one

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        spare_training(self.callback_handler.callbacks)
        self._counts = Counts(self.accelerator, self.denoiser)
        self._run: RunFacts | None = None  # that the last call of `train` began, or went on with
        self._finished = False  # whether the checkpoint that training starts from has all its updates
        self._columns: Collection[str] = ()  # of the first row; known from the start of training on

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
        """Write the LoRA, or the whole pipeline with its own scheduler.

        `pipeline.load_lora_weights(output_dir)` reads the LoRA, or where the pipeline takes none, its network:
        `network.load_lora_adapter(output_dir, prefix=None, weight_name="pytorch_lora_weights.safetensors")`. The card says which.

        In a dry run nothing is written.

        Raises:
            ValueError: if the network is not as it was trained, its adapter taken away or set to another strength, or if a weight
                is NaN or infinite; what lies in the folder stays as it is.
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
            self._wait()  # for the files of the other processes
            if self.args.should_save:
                RunRecord.write(partial, self._run, after=last_written(run_dir))
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
        if best == written or (self._run is not None and is_of(best, self._run.run)):
            self.state.best_model_checkpoint = str(best)

    def newest_checkpoint(self) -> Path | None:
        """The last one that this run has written, before an interruption too; `None` if there is none."""
        return None if self._run is None else newest_of(Path(self.args.output_dir), self._run.run)

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
        if not self._finished:  # otherwise nothing is evaluated
            self._columns = self._check_before_training()
            self._find_scale_before_training()
            if checkpoint is None and self.state.global_step == 0:  # else it is the base no more, and was probed before
                self._probe_before_training()
        self._counts, self._shown.evaluated = Counts(self.accelerator, self.denoiser), None
        with interruptible(self) if self.args.save_on_interrupt else contextlib.nullcontext():
            output = super().train(checkpoint, trial, ignore_keys_for_eval)
        if self._finished:  # the host's mean over no update is 0, which looks like a loss
            return output._replace(training_loss=math.nan, metrics=output.metrics | {"train_loss": math.nan})
        self._counts.updates.count.require_one(self.state, self._images_of_an_update)
        return output

    @property
    def _images_of_an_update(self) -> int:
        """On all processes together."""
        rows = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return rows * self.args.num_generations

    def _facts(self) -> RunFacts:
        """Of a new run with this network and these settings."""
        base, optimizer = self._base_and_optimizer
        lora = self.denoiser.base_adapters is not None
        adapter = adapter_facts(self.denoiser.network.peft_config[ADAPTER].to_dict()) if lora else None
        settings = settings_of(self.args, type(self).__name__, optimizer, self.reward.names)
        return RunFacts(uuid.uuid4().hex, settings, adapter, base, versions())

    @cached_property
    def _base_and_optimizer(self) -> tuple[str, str | None]:
        """Fingerprint of the base, and the class of an optimizer that the user made.

        As the first call of `train` finds them: later FSDP has divided the weights, and accelerate has wrapped the optimizer.
        """
        base = self.denoiser.network if self.denoiser.frozen is None else self.denoiser.frozen
        optimizer = None if self.optimizer is None else type(self.optimizer).__name__
        return base_fingerprint(base, self.denoiser.base_adapters), optimizer

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
        self._read_memory(folder)

    def _check_before_training(self) -> Collection[str]:
        """A subclass's checks, before any rollout; returns the names of the first row's columns, which all rows must have."""
        raise NotImplementedError

    def _write_memory(self, folder: Path) -> None:
        """What a subclass must know to go on from a checkpoint, besides weights, optimizer and random numbers."""
        raise NotImplementedError

    def _read_memory(self, folder: Path) -> None:
        """That of a checkpoint."""
        raise NotImplementedError

    def _find_scale_before_training(self) -> None:
        """λ, where a subclass is to find it."""
        raise NotImplementedError

    def _probe_before_training(self) -> None:
        """What a subclass measures on the base, where training starts from it."""
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

    @property
    def _shows_progress(self) -> bool:
        return not self.args.disable_tqdm and self.is_local_process_zero()

    def _text_encoders(self) -> contextlib.AbstractContextManager[None]:
        """They are on the device only while prompts are encoded, if asked so."""
        if not self.args.offload_text_encoders:
            return contextlib.nullcontext()
        return text_encoders_on(self.pipeline, self.args.device, self.replay.denoisers)

    def _show(self, name: str, pictures: SampleImages | None) -> None:
        """A grid in `output_dir/samples/` and in the trackers, where there are pictures."""
        if self.is_world_process_zero() and pictures is not None:
            show(pictures, name, self.state.global_step, Path(self.args.output_dir), self.callback_handler.callbacks)
