"""The command line: `diffusers-adjoint train --config recipe.yaml`, `evaluate` and `demo`.

`accelerate launch -m diffusers_adjoint.cli train --config recipe.yaml` is the same on several processes.
"""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from peft import LoraConfig
from transformers.utils import logging
from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config

from ..baselines.backpropagation import METHODS, RewardBackpropagationTrainer
from ..config import AdjointMatchingConfig
from ..data import prompts
from ..evaluate import EvaluationArguments, process_state
from ..evaluate import evaluate as run_evaluation
from ..evaluate.arguments import DTYPES
from ..model.loading import load_pipeline
from ..rewards import WeightedReward
from ..trainer.adjoint_matching import AdjointMatchingTrainer
from ..trainer.interrupt import exit_on_sigterm
from ..trainer.reward_trainer import RewardTrainer
from .loading import is_ours, load_features, load_rewards

__all__ = ["Arguments", "TrainArguments", "load_prompts", "load_rewards", "lora_config", "main"]
__all__ += ["parse_arguments", "parse_evaluation_arguments"]

logger = logging.get_logger(__name__)

PROGRAM = "diffusers-adjoint"
LONGEST_ERROR = 1000  # characters of an error line
# A token after its option, in JSON after its name, or what looks like one of the Hub.
SECRET = re.compile(r"""(--\w*token[ =]["']?|\w*token"\s*:\s*")[^\s"']+|hf_[a-zA-Z0-9]{30,}""", re.IGNORECASE)
DIGITS = Path(__file__).parents[3] / "examples" / "digits"  # of the checkout that an editable install points to
# trl.ModelConfig is made for language models: these options would change nothing here.
WITHOUT_EFFECT = ["attn_implementation", "load_in_8bit", "load_in_4bit", "bnb_4bit_quant_type", "use_bnb_nested_quant"]
WITHOUT_EFFECT += ["bnb_4bit_quant_storage", "lora_task_type"]


@dataclass
class TrainArguments(ScriptArguments):
    """Arguments of `train`: the dataset, as in TRL's scripts, and the rewards."""

    reward_funcs: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Rewards: names of diffusers_adjoint.rewards (PickScore), module:function, or path/to/file.py:function; "
            "a class is instantiated without arguments."
        },
    )

    method: str = field(
        default="adjoint_matching",
        metadata={
            "help": "adjoint_matching, with the objective that loss_type names, or discrete_adjoint: back-propagation through "
            "the sampler, for comparison."
        },
    )

    def __post_init__(self) -> None:
        if self.method not in ("adjoint_matching", *METHODS):
            raise ValueError(f"method={self.method!r} is unknown; pass adjoint_matching or {' or '.join(METHODS)}.")
        if isinstance(self.reward_funcs, str):  # a YAML file may name a single one
            self.reward_funcs = [self.reward_funcs]


@dataclass(frozen=True)
class Arguments:
    """What a command line and its recipe say."""

    script: Any  # of the type asked for
    config: AdjointMatchingConfig
    model: ModelConfig

    @property
    def resume(self) -> str | bool | None:
        """`--resume_from_checkpoint`: a folder, or the last checkpoint, which a command line can only spell as a word."""
        value = self.config.resume_from_checkpoint
        return {"true": True, "false": False}.get(str(value).lower(), value)


def parse_arguments(
    argv: Sequence[str], script_type: type = TrainArguments, prog: str = f"{PROGRAM} train", **defaults: Any
) -> Arguments:
    """Read options and the `--config` file; an option wins over the file. Bad ones exit with status 2 and one line.

    Args:
        argv: without the program's name.
        script_type: dataclass of the script's own options, `trl.ScriptArguments` or a subclass.
        prog: the program's name in help and errors.
        defaults: of options, in place of their own.
    """

    def check(script: Any, config: AdjointMatchingConfig, model: ModelConfig) -> None:
        _check_model(model)
        _merge_init_kwargs(config, model)

    return Arguments(*_parsed(argv, (script_type, AdjointMatchingConfig, ModelConfig), prog, check, defaults))


def parse_evaluation_arguments(argv: Sequence[str]) -> EvaluationArguments:
    """As `parse_arguments`, the options of `evaluate`."""
    return cast("EvaluationArguments", _parsed(argv, (EvaluationArguments,), f"{PROGRAM} evaluate")[0])


def _parsed(
    argv: Sequence[str],
    types: tuple[type, ...],
    prog: str,
    check: Callable[..., None] = lambda *_: None,
    defaults: Mapping[str, Any] | None = None,
) -> list[Any]:
    """One instance of each type, after `check`."""
    parser = TrlParser(types, prog=prog, usage=f"{prog} [--config FILE] [--OPTION VALUE …]")
    parser.add_argument("--config", default=argparse.SUPPRESS, help="YAML file of options; the command line wins.")
    parser.set_defaults(**(defaults or {}))
    try:
        # TrlParser takes "--config FILE" only, and its own reading of a lone "--config" is an IndexError.
        known, rest = _config_option(prog).parse_known_args(argv)
        rest = ["--config", known.config, *rest] if known.config else rest
        options = {"return_remaining_strings": True, "separate_remaining_strings": True}
        *parsed, in_file, in_argv = parser.parse_args_and_config(rest, **options)
        if unknown := [*in_file, *in_argv]:
            raise ValueError(f"unknown options {' '.join(unknown)}; {prog} --help lists all of them.")
        check(*parsed)
    except Exception as error:  # whatever argparse, the YAML reader or a config raises here is about the arguments
        parser.error(_one_line(error))
    return parsed


def _config_option(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, usage=f"{prog} [--config FILE] …", add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    return parser


def _check_model(model: ModelConfig) -> None:
    usual = ModelConfig()
    if model.model_name_or_path is None:
        raise ValueError("model_name_or_path is missing; pass the name or folder of a diffusers pipeline.")
    if model.dtype not in DTYPES:
        raise ValueError(f"dtype={model.dtype!r} is unknown to diffusers; pass one of {', '.join(DTYPES)}.")
    for name in WITHOUT_EFFECT:
        if getattr(model, name) != getattr(usual, name):
            raise ValueError(f"{name} is an option for language models without effect on a pipeline; leave it out.")
    if not model.use_peft and (model.lora_r, model.lora_alpha) != (usual.lora_r, usual.lora_alpha):
        logger.warning("lora_r and lora_alpha have no effect: without use_peft all weights of the network are trained.")


def _merge_init_kwargs(config: AdjointMatchingConfig, model: ModelConfig) -> None:
    kwargs = cast("dict[str, Any]", config.model_init_kwargs or {})  # the config has parsed a string
    for name, option in {"dtype": "dtype", "torch_dtype": "dtype", "revision": "model_revision"}.items():
        if name in kwargs:
            raise ValueError(f"model_init_kwargs contains {name!r}; pass {option} instead.")
    config.model_init_kwargs = kwargs | {"dtype": DTYPES[model.dtype], "revision": model.model_revision}


def lora_config(model: ModelConfig) -> LoraConfig | None:
    """The adapter that the `lora_…` options describe; `None`, for full fine-tuning, without `use_peft`."""
    config = get_peft_config(model)
    if config is not None:
        config.task_type = None  # TRL's default says that this is a language model
        if model.lora_dropout == ModelConfig().lora_dropout:
            config.lora_dropout = 0.0  # as the trainer demands; a value that the user chose gets its warning
        if isinstance(config.target_modules, str) and re.fullmatch(r"[\w.]+", config.target_modules):
            config.target_modules = {config.target_modules}  # one name: ModelConfig made a string of it, a pattern to PEFT
    return config


def load_prompts(script: ScriptArguments, split: str) -> Any:
    """One split of the dataset that a script's options name; see `prompts.load_prompts`."""
    name, config, streaming = script.dataset_name, script.dataset_config, script.dataset_streaming
    return prompts.load_prompts(name, split, config=config, streaming=streaming)


def train(argv: Sequence[str]) -> int:
    """Fine-tune a pipeline on a reward; all options: `train --help`."""
    arguments = parse_arguments(argv, save_on_interrupt=True)
    trainer = None
    try:
        with exit_on_sigterm():
            trainer = trainer_of(arguments)
            trainer.train(resume_from_checkpoint=arguments.resume)
            _finish(trainer, arguments)
    except (KeyboardInterrupt, SystemExit) as stop:
        code = 130 if isinstance(stop, KeyboardInterrupt) else stop.code
        if code not in (130, 143):
            raise
        if trainer is None or trainer.is_world_process_zero():
            print(f"{PROGRAM}: interrupted {_how_to_go_on(trainer, arguments, argv)}", file=sys.stderr)
        return code
    return 0


def trainer_of(arguments: Arguments) -> RewardTrainer:
    """The trainer that the command starts; raises ValueError for what cannot be loaded."""
    script, config, model = arguments.script, arguments.config, arguments.model
    # What is cheap to get wrong comes before the weights are loaded.
    reward_funcs = load_rewards(script.reward_funcs)
    train_dataset = load_prompts(script, script.dataset_train_split)
    eval_dataset = load_prompts(script, script.dataset_test_split) if config.eval_strategy != "no" else None
    init_kwargs = cast("dict[str, Any]", config.model_init_kwargs)
    pipeline = _load_pipeline(model.model_name_or_path, init_kwargs, config.trained_component)
    given = (pipeline, reward_funcs, config, train_dataset, eval_dataset)
    if script.method in METHODS:
        return RewardBackpropagationTrainer(*given, peft_config=lora_config(model), method=script.method)
    return AdjointMatchingTrainer(*given, peft_config=lora_config(model))


def _finish(trainer: RewardTrainer, arguments: Arguments) -> None:
    """What comes after training."""
    if trainer.eval_dataset is not None:
        if trainer.newest_checkpoint() is None:  # what was trained is in memory alone, and an evaluation may fail
            trainer.save_model(_internal_call=True)
        trainer.evaluate()
    if arguments.config.push_to_hub:
        name = arguments.script.dataset_name
        trainer.push_to_hub(dataset_name=None if Path(name).exists() else name)  # the names of local files stay here
    else:
        trainer.save_model()


def _how_to_go_on(trainer: RewardTrainer | None, arguments: Arguments, argv: Sequence[str]) -> str:
    """The end of a line about an interruption."""
    made, resumes = trainer.state.global_step if trainer else 0, bool(arguments.resume)
    first = f"before the first update{' of this start' if resumes else ''}"
    where = f"after update {made} of {trainer.state.max_steps}" if trainer and made else first
    if trainer is None or (newest := trainer.newest_checkpoint()) is None:
        return f"{where}{'; the same command goes on' if resumes else ', without a checkpoint; the same command starts anew'}."
    again = shlex.join([*argv, "--resume_from_checkpoint", "true"])  # the last one counts
    program = PROGRAM if trainer.args.world_size == 1 else "accelerate launch -m diffusers_adjoint.cli"
    again = SECRET.sub(lambda found: f"{found[1] or ''}…", again)
    return f"{where}; newest checkpoint: {newest}; go on with: {program} train {again}"


def _load_pipeline(name: str, init_kwargs: dict[str, Any], component: str | None) -> Any:
    try:
        return load_pipeline(name, init_kwargs, component)
    except OSError as error:
        raise ValueError(f"model_name_or_path={name!r} cannot be loaded ({_one_line(error)}); pass a pipeline's name.") from error


def evaluate(argv: Sequence[str]) -> int:
    """Compare a fine-tuned model with its base: rewards, diversity, image statistics; all options: `evaluate --help`."""
    args = parse_evaluation_arguments(argv)
    # What is cheap to get wrong comes before the weights are loaded.
    dataset = prompts.load_prompts(args.prompts, args.split, config=args.dataset_config, option="prompts")
    functions = load_rewards(args.rewards)
    reward = WeightedReward(functions, args.reward_weights, images_as=args.images_as, workers=args.reward_workers)
    state = process_state()
    features = load_features(args.diversity, args.rewards, functions, state.device)
    try:
        report = run_evaluation(args, reward, features, dataset)
    except KeyboardInterrupt:
        again = "the same command without overwrite_output_dir" if args.overwrite_output_dir else "the same command"
        print(f"{PROGRAM}: interrupted; finished prompts are in {args.output_dir}, {again} goes on.", file=sys.stderr)
        return 130
    finally:
        state.destroy_process_group()
    if state.is_main_process:
        print(f"\n{report.markdown()}\nTables and contact sheets are in {args.output_dir}/")
    return 0


def demo(argv: Sequence[str]) -> int:
    """Fine-tune a small pipeline that draws digits and compare it with the exact target; needs a checkout."""
    parser = argparse.ArgumentParser(
        prog=f"{PROGRAM} demo",
        description=f"{demo.__doc__} Other options (--reward ink or three, --output, --seed) go to its demo.py.",
    )
    parser.add_argument("--path", type=Path, default=DIGITS, help="folder examples/digits of a checkout (default: this one's)")
    known, rest = parser.parse_known_args(argv)
    file = known.path / "demo.py"
    if not file.is_file():
        raise ValueError(f"there is no {file}; pass --path with the folder examples/digits of a checkout of {PROGRAM}.")
    return subprocess.run([sys.executable, str(file), *rest], check=False).returncode


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {"train": train, "evaluate": evaluate, "demo": demo}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status. Our own errors, being one sentence, are printed without a traceback."""
    argv = sys.argv[1:] if argv is None else argv
    commands = "\n".join(f"  {name:<8}{command.__doc__}" for name, command in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        usage=f"{PROGRAM} {{{','.join(COMMANDS)}}} [--OPTION VALUE …]",
        description=f"Reward fine-tuning of diffusers pipelines with Adjoint Matching.\n\ncommands:\n{commands}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, help=argparse.SUPPRESS)
    command = COMMANDS[parser.parse_args(argv[:1]).command]
    try:
        return command(argv[1:])
    except (ImportError, TypeError, ValueError) as error:
        if not is_ours(error):
            raise  # not a message of ours: the traceback is needed
        print(f"{PROGRAM}: error: {_one_line(error)}", file=sys.stderr)
        return 1


def _one_line(error: BaseException) -> str:
    """Cut in the middle when it is longer than a screen, as a value in it may be: what to pass instead stands at the end."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= LONGEST_ERROR else f"{text[: LONGEST_ERROR - 300]} […] {text[-295:]}"
