"""The commands `diffusers-adjoint train --config recipe.yaml`, `evaluate` and `demo`.

`accelerate launch -m diffusers_adjoint.cli train --config recipe.yaml` runs the first on several processes.
"""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

from trl import ScriptArguments

from ..baselines.backpropagation import METHODS, RewardBackpropagationTrainer
from ..data import prompts
from ..evaluate import EvaluationArguments, process_state
from ..evaluate import evaluate as run_evaluation
from ..model.loading import load_pipeline
from ..rewards import WeightedReward
from ..trainer.adjoint_matching import AdjointMatchingTrainer
from ..trainer.interrupt import exit_on_sigterm
from ..trainer.reward_trainer import RewardTrainer
from .arguments import Arguments, TrainArguments, lora_config, parse_arguments, parse_evaluation_arguments
from .errors import PROGRAM, one_line
from .loading import load_features, load_rewards

__all__ = ["COMMANDS", "Arguments", "TrainArguments", "load_prompts", "load_rewards", "lora_config", "parse_arguments"]
__all__ += ["parse_evaluation_arguments"]

# Secrets to hide in messages: the value after an option or a JSON key that ends in "token", and Hub tokens anywhere.
SECRET = re.compile(r"""(--\w*token[ =]["']?|\w*token"\s*:\s*")[^\s"']+|hf_[a-zA-Z0-9]{30,}""", re.IGNORECASE)
DIGITS = Path(__file__).parents[3] / "examples" / "digits"  # exists in a checkout with an editable install


def load_prompts(script: ScriptArguments | EvaluationArguments, split: str) -> Any:
    """One split of the dataset that a script's options name; see `prompts.load_prompts`."""
    name, config, streaming = script.dataset_name, script.dataset_config, script.dataset_streaming
    return prompts.load_prompts(name, split, config=config, streaming=streaming)


def train(argv: Sequence[str]) -> int:
    """Fine-tune a pipeline on a reward; `train --help` lists the options. Returns the exit status."""
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
    """Make the trainer of the command `train`; raises ValueError if the model, a reward or a dataset cannot be loaded."""
    script, config, model = arguments.script, arguments.config, arguments.model
    # Rewards and datasets first: a typo there should not cost the time to load the weights.
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
    """Evaluate, and save or upload the model after training; nothing after a dry run."""
    if arguments.config.dry_run:
        return
    if trainer.eval_dataset is not None:
        if trainer.newest_checkpoint() is None:  # the trained weights are in memory only, and the evaluation may fail
            trainer.save_model(_internal_call=True)
        trainer.evaluate()
    if arguments.config.push_to_hub:
        name = arguments.script.dataset_name
        trainer.push_to_hub(dataset_name=None if Path(name).exists() else name)  # do not publish the name of a local file
    else:
        trainer.save_model()


def _how_to_go_on(trainer: RewardTrainer | None, arguments: Arguments, argv: Sequence[str]) -> str:
    """The end of the message about an interruption: where training was stopped, and the command that resumes it."""
    made, resumes = trainer.state.global_step if trainer else 0, bool(arguments.resume)
    first = f"before the first update{' of this start' if resumes else ''}"
    where = f"after update {made} of {trainer.state.max_steps}" if trainer and made else first
    if trainer is None or (newest := trainer.newest_checkpoint()) is None:
        again = "; the same command resumes it" if resumes else ", without a checkpoint; the same command starts again"
        return f"{where}{again}."
    again = shlex.join([*argv, "--resume_from_checkpoint", "true"])  # if the option is given twice, the last one counts
    program = PROGRAM if trainer.args.world_size == 1 else "accelerate launch -m diffusers_adjoint.cli"
    again = SECRET.sub(lambda found: f"{found[1] or ''}…", again)
    return f"{where}; newest checkpoint: {newest}; resume with: {program} train {again}"


def _load_pipeline(name: str, init_kwargs: dict[str, Any], component: str | None) -> Any:
    try:
        return load_pipeline(name, init_kwargs, component)
    except OSError as error:
        raise ValueError(
            f"model_name_or_path={name!r} cannot be loaded ({one_line(error)}); pass the name or folder of a pipeline."
        ) from error


def evaluate(argv: Sequence[str]) -> int:
    """Compare a fine-tuned model with its base: rewards, diversity, image statistics. Returns the exit status."""
    args, passed_over = parse_evaluation_arguments(argv)
    # Dataset and rewards first: a typo there should not cost the time to load the weights.
    dataset = load_prompts(args, args.dataset_train_split)
    functions = load_rewards(args.reward_funcs)
    reward = WeightedReward(functions, args.reward_weights, images_as=args.images_as, workers=args.reward_workers)
    state = process_state()
    if passed_over and state.is_main_process:
        print(f"{PROGRAM}: ignored, because they are options of train only: {', '.join(passed_over)}.", file=sys.stderr)
    features = load_features(args.diversity, args.reward_funcs, functions, state.device)
    try:
        report = run_evaluation(args, reward, features, dataset)
    except KeyboardInterrupt:
        again = "the same command without overwrite_output_dir" if args.overwrite_output_dir else "the same command"
        print(f"{PROGRAM}: interrupted; finished prompts are in {args.output_dir}, {again} resumes.", file=sys.stderr)
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
        allow_abbrev=False,
        description=f"{demo.__doc__} Other options (--reward ink or three, --output, --seed) go to its demo.py.",
    )
    parser.add_argument("--path", type=Path, default=DIGITS, help="folder examples/digits of a checkout (default: this one's)")
    known, rest = parser.parse_known_args(argv)
    file = known.path / "demo.py"
    if not file.is_file():
        raise ValueError(f"there is no {file}; pass --path with the folder examples/digits of a checkout of {PROGRAM}.")
    return subprocess.run([sys.executable, str(file), *rest], check=False).returncode


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {"train": train, "evaluate": evaluate, "demo": demo}
