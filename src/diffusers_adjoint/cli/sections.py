"""The help of `train` and `evaluate`: its sections, and help texts for TRL's options that fit a pipeline."""

from __future__ import annotations

from dataclasses import fields

from transformers import TrainingArguments
from trl import ModelConfig

from ..config import AdjointMatchingConfig
from ..evaluate import EvaluationArguments
from .options import HOST

__all__ = ["EVALUATION", "TEXTS", "training_sections"]

# Fields of AdjointMatchingConfig and TrainingArguments by section; all other fields of our own are in "adjoint matching".
OF_MODEL = ["model_init_kwargs", "pipeline_kwargs", "trained_component", "offload_text_encoders"]
OF_DATA = ["reward_weights", "images_as", "reward_workers", "remove_unused_columns"]
OF_LOG = ["output_dir", "logging_steps", "save_steps", "save_on_interrupt", "resume_from_checkpoint", "report_to"]
OF_LOG += ["num_images_to_log", "num_generations_eval", "per_device_eval_batch_size", "metric_for_best_model"]

TEXTS = {
    "model_name_or_path": "Name or folder of the pipeline.",
    "model_revision": "Branch, tag or commit of the pipeline on the Hub.",
    "dtype": "Dtype of the pipeline's weights.",
    "use_peft": "Train a LoRA with the lora options; without it all weights of the network are trained.",
    "lora_r": "Rank of the LoRA.",
    "lora_alpha": "Strength of the LoRA, whose output is scaled by lora_alpha / lora_r.",
    "lora_target_modules": "Layers that get a LoRA, or a pattern of their names; the attention projections when not given.",
    "use_rslora": "Rank-stabilised LoRA: its output is scaled by lora_alpha / √lora_r.",
    "use_dora": "DoRA: direction and magnitude of the weights are trained separately.",
    "dataset_name": "File (.txt, .json, .jsonl, .csv, .parquet), folder or Hub dataset with a 'prompt' column.",
    "dataset_config": "Configuration of the dataset.",
    "dataset_train_split": "Split to train on; a single file is 'train'.",
    "dataset_test_split": "Split to evaluate on, with eval_strategy.",
    "dataset_streaming": "Read the dataset's rows only when they are needed.",
    "output_dir": "Folder for checkpoints, samples and the trained weights; trainer_output when not given.",
    "max_steps": "Updates of the weights; if it is not positive, num_train_epochs counts.",
    "resume_from_checkpoint": "Folder of a checkpoint to resume from; true for the newest in output_dir.",
}


def training_sections(script_type: type) -> dict[str, list[str]]:
    """The sections of the help of `train`, or of a script with its own options: title → names of options."""
    host = {field.name for field in fields(TrainingArguments)}
    declared = list(AdjointMatchingConfig.__annotations__)
    ours = [name for name in declared if name not in host] + [name for name in declared if name in host]
    elsewhere = {*OF_MODEL, *OF_DATA, *OF_LOG}
    sections = {
        "adjoint matching": ["method", *(name for name in ours if name not in elsewhere), "max_steps"],
        "model and LoRA": [*(field.name for field in fields(ModelConfig)), *OF_MODEL],
        "data and rewards": [*(field.name for field in fields(script_type) if field.name != "method"), *OF_DATA],
        "logging": OF_LOG,
    }
    listed = {name for names in sections.values() for name in names}
    return sections | {HOST: [field.name for field in fields(AdjointMatchingConfig) if field.name not in listed]}


EVALUATION = {"evaluation": [field.name for field in fields(EvaluationArguments)]}
