"""Publishing on the Hub: the model card with its sample images, and the upload."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from diffusers import DiffusionPipeline, ModularPipeline
from huggingface_hub import CommitOperationAdd, HfApi
from transformers import Trainer
from transformers.trainer_utils import HubStrategy
from transformers.utils import PushInProgress

from ..config import AdjointMatchingConfig
from ..data.columns import collate_columns, first_row
from ..data.given_datasets import num_prompts
from ..hub import CARD_FILES, CardFacts, card_facts, pipeline_files, public_json, write_card
from ..model.denoiser import PipelineDenoiser
from ..model.lora import WEIGHTS_NAME
from ..objectives import Method
from ..pictures.samples import SampleImages
from ..pictures.trackers import warn_if_lost
from ..replay import PipelineReplay
from ..rewards import WeightedReward
from .run_record import RECORD_NAME, rehashed
from .shown import Shown

__all__ = ["PublishingTrainer"]


class PublishingTrainer(Trainer):
    """Base trainer that writes the model card and uploads a diffusers pipeline. Subclasses train it."""

    args: AdjointMatchingConfig
    # The constructor of a subclass sets these before it calls this one.
    pipeline: DiffusionPipeline | ModularPipeline
    replay: PipelineReplay
    denoiser: PipelineDenoiser
    reward: WeightedReward
    method: Method
    push_in_progress: Any = None  # the host sets it only when it creates a repository

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._shown = Shown()  # a subclass fills it

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None, **kwargs: Any
    ) -> None:
        """Write the model card README.md and its sample images into `output_dir`; nothing in a dry run.

        Args:
            model_name: Hub id or plain name of the model; the name of `output_dir` when not given.
            dataset_name: Hub id of the dataset of prompts.
            tags: further tags.
            kwargs: unused, and here because other trainers have them.
        """
        if self.is_world_process_zero() and not self.args.dry_run:
            facts, samples = self._card_facts(model_name, dataset_name, tags)
            write_card(self.args.output_dir, facts, samples.images, samples.prompts, self._shown.before())

    def _card_facts(
        self, model_name: str | None, dataset_name: str | None, tags: str | list[str] | None
    ) -> tuple[CardFacts, SampleImages]:
        samples = self._shown.for_card()
        takes_prompt = self.replay.arguments.takes_prompt
        row = samples.row or collate_columns([first_row(self.train_dataset, "train_dataset", takes_prompt)])
        facts = card_facts(
            self.replay,
            self.reward,
            self.args,
            self.state,
            row,
            self.method,
            repo_id=model_name or self.hub_model_id or Path(self.args.output_dir).resolve().name,
            base_adapters=self.denoiser.base_adapters,
            dataset_name=dataset_name,
            num_prompts=num_prompts(self.train_dataset),
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
        """Upload the LoRA, or the whole pipeline, with the model card and sample images; nothing in a dry run.

        Other files of `output_dir` are not uploaded. Arguments and result are those of `transformers.Trainer.push_to_hub`;
        `kwargs` go to `create_model_card`.
        """
        if self.args.dry_run:
            return None
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self._finish_current_push()
        return self._upload(commit_message, token, revision, run_as_future=not blocking, **kwargs)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """After a checkpoint, upload in the background what `hub_strategy` asks for."""
        strategy = self.args.hub_strategy
        if strategy == HubStrategy.END:
            return
        busy = [self.push_in_progress is not None and not self.push_in_progress.is_done()]
        broadcast_object_list(busy)  # only the first process uploads, and all must make the same choice
        if busy[0] and not self.args.hub_always_push:
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
        if busy[0]:
            self.push_in_progress.jobs.extend(jobs)
        else:
            self.push_in_progress = PushInProgress(jobs)

    def _upload(self, message: str | None, token: str | None, revision: str | None, *, run_as_future: bool, **card: Any) -> Any:
        with warn_if_lost("README.md could not be written") if self.is_in_train else contextlib.nullcontext():
            self.create_model_card(**{"model_name": self.hub_model_id} | card)
        weights = [WEIGHTS_NAME] if self.denoiser.base_adapters is not None else pipeline_files(self.pipeline)
        return HfApi().upload_folder(
            repo_id=self.hub_model_id,
            folder_path=self.args.output_dir,
            allow_patterns=[*weights, *CARD_FILES],  # not the trackers' files: they may contain local paths
            commit_message=message,
            token=token or self.args.hub_token,
            run_as_future=run_as_future,
            revision=revision or self.args.hub_revision,
        )

    def _upload_checkpoint(self, folder: Path, name: str, message: str) -> Any:
        files = {file.relative_to(folder).as_posix(): file for file in folder.rglob("*") if file.is_file()}
        changed = {path: public_json(file) for path, file in files.items() if file.suffix == ".json" and path != RECORD_NAME}
        changed[RECORD_NAME] = rehashed((folder / RECORD_NAME).read_bytes(), changed)
        contents = {path: changed.get(path, str(file)) for path, file in files.items()}
        return HfApi().create_commit(
            repo_id=self.hub_model_id,
            operations=[CommitOperationAdd(f"{name}/{path}", content) for path, content in contents.items()],
            commit_message=message,
            token=self.args.hub_token,
            run_as_future=True,
            revision=self.args.hub_revision,
        )
