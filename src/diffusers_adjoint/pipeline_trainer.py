"""What `transformers.Trainer` must be told about a diffusers pipeline: batches, saving, resuming, evaluation, the Hub."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import CommitOperationAdd, HfApi
from torch import Tensor, nn
from transformers import Trainer, TrainerControl
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy
from transformers.utils import PushInProgress

from .callbacks import SaveOnInterrupt
from .checkpoint import checkpoint_to_resume, discard_leftovers, rotate, whole_files, whole_folder
from .config import AdjointMatchingConfig
from .denoiser import PipelineDenoiser
from .hub import CARD_FILES, CardFacts, card_facts, pipeline_files, save_pipeline, write_card
from .inputs import collate_columns, first_row, repeat_rows, rows_of
from .lora import WEIGHTS_NAME, load_lora, save_lora
from .replay import PipelineReplay
from .rewards import WeightedReward
from .sample_images import SampleImages, image_grid, save_grid, to_trackers
from .sample_log import summarise

__all__ = ["PipelineTrainer"]


class PipelineTrainer(Trainer):
    """A `Trainer` of a pipeline's denoiser that knows no loss: the habits of the host, kept for another kind of model."""

    args: AdjointMatchingConfig
    pipeline: DiffusionPipeline
    replay: PipelineReplay
    denoiser: PipelineDenoiser
    reward: WeightedReward
    control: TrainerControl
    push_in_progress: Any
    _pictures: SampleImages | None = None  # of the last rollout
    _evaluated: SampleImages | None = None  # of the last evaluation

    # --------------------------------------------------------------------------------------------------------------- batches

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        """Number the images of an update across micro-batches and processes, in the order one process would see them."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        repeated = [repeat_rows(columns, self.args.num_generations) for columns in batches]
        sizes = [rows_of(columns) for columns in repeated]
        inputs = []
        for i, columns in enumerate(repeated):
            first = sum(sizes[:i]) * self.args.world_size + self.args.process_index * sizes[i]
            last = i == len(repeated) - 1
            inputs.append({"columns": columns, "first_image": first, "share": sizes[i] / sum(sizes), "last": last})
        return inputs, items

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["prompt"]  # Trainer would look for forward's arguments among the dataset's columns

    # ---------------------------------------------------------------------------------------------------------------- saving

    @property
    def _weights_name(self) -> str:
        """File or folder of a checkpoint that holds what was trained."""
        return self.replay.component if self.denoiser.base_adapters is None else WEIGHTS_NAME

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the LoRA that `pipeline.load_lora_weights(output_dir)` reads, or the whole pipeline with its own scheduler."""
        with whole_files(Path(output_dir or self.args.output_dir), self.args.should_save, self._wait) as partial:
            if self.denoiser.base_adapters is not None:
                self._write_weights(partial)
            elif self.args.should_save:
                save_pipeline(partial, self.pipeline)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _write_weights(self, folder: Path) -> None:
        if not self.args.should_save:
            return
        if self.denoiser.base_adapters is None:
            self.denoiser.network.save_pretrained(folder / self.replay.component)
        else:
            save_lora(self.pipeline, self.replay.component, folder)

    def _wait(self) -> None:
        self.accelerator.wait_for_everyone()

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """The host's checkpoint, except that a folder `checkpoint-N` is whole or absent, and that the weights are ours."""
        run_dir = Path(self._get_output_dir(trial=trial))
        folder = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        best = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
        if best == folder or best.is_dir():
            self.state.best_model_checkpoint = str(best)
        with whole_folder(folder, self.args.should_save, self._wait) as partial:
            self._write_weights(partial)
            if not self.args.save_only_model:
                self._save_optimizer_and_scheduler(str(partial))
                self._save_scaler(str(partial))
                self._save_rng_state(str(partial))
            if self.args.should_save:
                self._write_state(partial)
        self.create_model_card()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder))
        if self.args.should_save:
            rotate(run_dir, self.args.save_total_limit, self.state.best_model_checkpoint)

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
        """
        run_dir = Path(self.args.output_dir)
        plain = not (self.is_fsdp_enabled or self.is_deepspeed_enabled or self.args.save_only_model)
        needed = [self._weights_name, TRAINER_STATE_NAME] + (["optimizer.pt", "scheduler.pt"] if plain else [])
        checkpoint = checkpoint_to_resume(resume_from_checkpoint, run_dir, needed)
        if self.args.should_save:
            discard_leftovers(run_dir)
        self._check_before_training()
        if not self.args.save_on_interrupt:
            return super().train(checkpoint, trial, ignore_keys_for_eval)
        with SaveOnInterrupt(self.accelerator) as interrupt:
            self.add_callback(interrupt)
            try:
                return super().train(checkpoint, trial, ignore_keys_for_eval)
            finally:
                self.remove_callback(interrupt)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        network, folder = self.denoiser.network, Path(resume_from_checkpoint)
        if self.denoiser.base_adapters is None:
            saved = type(network).from_pretrained(folder / self.replay.component, dtype=network.dtype)
            network.load_state_dict(saved.state_dict())
        else:
            load_lora(network, self.replay.component, folder)

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _check_before_training(self) -> None:
        raise NotImplementedError

    # ------------------------------------------------------------------------------------------------------------ evaluation

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Sample the prompts with the pipeline's own scheduler; report the rewards of what a user would see, and their price.

        Args:
            eval_dataset: rows as in training, or a dict of several datasets, whose names become part of the metrics' names; the
                trainer's own when not given.
            ignore_keys: unused.
            metric_key_prefix: what the metrics' names begin with.

        Returns:
            Means over the rows: `eval_reward`, `eval_reward_std`, `eval_rewards/<name>/mean` and `/std`, `eval_diversity`,
            `eval_saturated`, `eval_kl` or `eval_kl_unguided` in nats.

        Raises:
            ValueError: if there is no dataset.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if dataset is None:
            raise ValueError("there is no eval_dataset; pass one here or to the trainer.")
        if isinstance(dataset, dict):
            return {
                name: value
                for key, part in dataset.items()
                for name, value in self.evaluate(part, ignore_keys, f"{metric_key_prefix}_{key}").items()
            }
        samples, pictures = self._measure(dataset)
        self._evaluated = pictures
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in summarise(samples).items()}
        self.log(metrics)
        if pictures is not None:
            self._show(metric_key_prefix, pictures)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _measure(self, dataset: Any) -> tuple[dict[str, Tensor], SampleImages | None]:
        """Measurements of all rows, name → (N,), and the first images."""
        raise NotImplementedError

    def _show(self, name: str, pictures: SampleImages) -> None:
        """A grid in `output_dir/samples/` and in the trackers."""
        if not (self.args.log_images and self.is_world_process_zero() and pictures.drawable):
            return
        grid, step = image_grid(pictures), self.state.global_step
        save_grid(grid, Path(self.args.output_dir) / "samples", name, step)
        to_trackers(self.callback_handler.callbacks, grid, f"{name}/samples", step)

    def _drop_gradients(self, model: nn.Module) -> None:
        """Make the coming step of the optimizer do nothing."""
        if self.accelerator.scaler is None:
            model.zero_grad()
        else:  # it insists on gradients, and skips the step itself when one overflows
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.grad.fill_(torch.inf)

    # --------------------------------------------------------------------------------------------------------------- the Hub

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None, **kwargs: Any
    ) -> None:
        """Write README.md, with the samples it shows, into `output_dir`.

        Args:
            model_name: Hub id or plain name; that of `output_dir` when not given.
            dataset_name: Hub id of the prompts.
            tags: further tags.
            kwargs: what other trainers' cards take; unused.
        """
        if self.is_world_process_zero():
            facts, samples = self._card_facts(model_name, dataset_name, tags)
            write_card(self.args.output_dir, facts, samples.images, samples.prompts)

    def _card_facts(
        self, model_name: str | None, dataset_name: str | None, tags: str | list[str] | None
    ) -> tuple[CardFacts, SampleImages]:
        samples = self._evaluated or self._pictures or SampleImages(torch.zeros(0, 3, 1, 1), [], torch.zeros(0))
        takes_prompt = self.replay.arguments.takes_prompt
        row = samples.row or collate_columns([first_row(self.train_dataset, "train_dataset", takes_prompt)])
        facts = card_facts(
            self.replay,
            self.reward,
            self.args,
            self.state,
            row,
            repo_id=model_name or self.hub_model_id or Path(self.args.output_dir).resolve().name,
            base_adapters=self.denoiser.base_adapters,
            dataset_name=dataset_name,
            tags=[tags] if isinstance(tags, str) else tags or [],
        )
        return facts, samples

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Upload the LoRA, or the whole pipeline, with a card and sample images; nothing else of `output_dir`.

        Arguments and result as in `transformers.Trainer`; `kwargs` go to `create_model_card`.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self._finish_current_push()
        return self._upload(commit_message, token, revision, run_as_future=not blocking, **kwargs)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """What `hub_strategy` asks for, in the background, after a checkpoint."""
        strategy, busy = self.args.hub_strategy, self.push_in_progress is not None and not self.push_in_progress.is_done()
        if strategy == HubStrategy.END or (busy and not self.args.hub_always_push):
            return
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        message, folder = f"Training in progress, step {self.state.global_step}", Path(checkpoint_folder)
        jobs = [self._upload(message, None, None, run_as_future=True)]
        if strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            name = "last-checkpoint" if strategy == HubStrategy.CHECKPOINT else folder.name
            jobs.append(self._upload_checkpoint(folder, name, f"{message}, checkpoint"))
        if busy:
            self.push_in_progress.jobs.extend(jobs)
        else:
            self.push_in_progress = PushInProgress(jobs)

    def _upload(self, message: str | None, token: str | None, revision: str | None, *, run_as_future: bool, **card: Any) -> Any:
        self.create_model_card(**{"model_name": self.hub_model_id} | card)
        weights = [WEIGHTS_NAME] if self.denoiser.base_adapters is not None else pipeline_files(self.pipeline)
        return HfApi().upload_folder(
            repo_id=self.hub_model_id,
            folder_path=self.args.output_dir,
            allow_patterns=[*weights, *CARD_FILES],  # trackers' files and pictures of training tell local paths, or nothing
            commit_message=message,
            token=token or self.args.hub_token,
            run_as_future=run_as_future,
            revision=revision or self.args.hub_revision,
        )

    def _upload_checkpoint(self, folder: Path, name: str, message: str) -> Any:
        files: dict[str, str | bytes] = {p.relative_to(folder).as_posix(): str(p) for p in folder.rglob("*") if p.is_file()}
        state = json.loads((folder / TRAINER_STATE_NAME).read_text())
        if best := state["best_model_checkpoint"]:
            state["best_model_checkpoint"] = Path(best).name  # not where it lies on this machine
        files[TRAINER_STATE_NAME] = json.dumps(state, indent=2).encode()
        return HfApi().create_commit(
            repo_id=self.hub_model_id,
            operations=[CommitOperationAdd(f"{name}/{path}", content) for path, content in files.items()],
            commit_message=message,
            token=self.args.hub_token,
            run_as_future=True,
            revision=self.args.hub_revision,
        )
