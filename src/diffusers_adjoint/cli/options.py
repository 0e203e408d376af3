"""TRL's option parser, without abbreviations and with the help in sections."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, get_type_hints

from trl import TrlParser

from ..evaluate.arguments import DTYPES
from .errors import one_line

__all__ = ["HOST", "NOT_FOR_PIPELINES", "OptionParser", "name_of"]

HOST = "options of transformers.TrainingArguments"  # this section is shown by `--help-all` only
# Options of trl.ModelConfig, trl.ScriptArguments and TrainingArguments that are for language models: here they have no effect, or
# do not work with a pipeline's LoRA.
NOT_FOR_PIPELINES = {"attn_implementation", "load_in_8bit", "load_in_4bit", "bnb_4bit_quant_type", "use_bnb_nested_quant"}
NOT_FOR_PIPELINES |= {"bnb_4bit_quant_storage", "lora_dropout", "lora_modules_to_save", "lora_target_parameters"}
NOT_FOR_PIPELINES |= {"lora_task_type", "ignore_bias_buffers", "average_tokens_across_devices", "use_cache"}
NOT_FOR_PIPELINES |= {"include_num_input_tokens_seen", "label_names", "label_smoothing_factor", "length_column_name"}
NOT_FOR_PIPELINES |= {"liger_kernel_config", "use_liger_kernel", "neftune_noise_alpha", "batch_eval_metrics"}
NOT_FOR_PIPELINES |= {"eval_accumulation_steps", "eval_do_concat_batches", "eval_use_gather_object", "include_for_metrics"}
NOT_FOR_PIPELINES |= {"prediction_loss_only"}
KINDS = {"dict": "JSON", "bool": "BOOL", "int": "INT", "float": "FLOAT"}  # shown for an option's value; TEXT for any other type


def name_of(word: str) -> str:
    """The option's name in a word such as `--max-steps=3`: "max_steps"."""
    return word.removeprefix("--").partition("=")[0].replace("-", "_")


class OptionParser(TrlParser):
    """Parses the fields of dataclasses as options.

    Args:
        types: the dataclasses.
        prog: the program's name in help and errors.
        sections: title → names of options, in the order of the help.
        texts: option → help text, to replace the one of TRL or transformers.
    """

    def __init__(
        self, types: Sequence[type], prog: str, sections: Mapping[str, Sequence[str]], texts: Mapping[str, str] | None = None
    ) -> None:
        usage = f"{prog} [--config FILE] [--OPTION VALUE …]"
        super().__init__(types, prog=prog, usage=usage, formatter_class=_Formatter, allow_abbrev=False)
        self.add_argument("--config", metavar="FILE", default=argparse.SUPPRESS, help="YAML file of options; an option wins.")
        if HOST in sections:
            text = f"show the {HOST}, too, and exit"
            self.add_argument("--help-all", action=_HelpAll, nargs=0, default=argparse.SUPPRESS, help=text)
        self.sections, self.shows_all = sections, False
        hints = {name: hint for each in types for name, hint in get_type_hints(each).items()}
        for action in self._actions:
            action.help = (texts or {}).get(action.dest, action.help)
            if action.choices is None or action.dest == "dtype":  # TRL's choices contain "auto", which diffusers lacks
                action.metavar = action.metavar or _value_of(action.dest, hints.get(action.dest))

    @staticmethod
    def _parse_dataclass_field(parser: Any, field: Any) -> None:
        """Add a field as an option, as in TRL; for a field that is not for pipelines, set its default only."""
        if field.name not in NOT_FOR_PIPELINES:
            TrlParser._parse_dataclass_field(parser, field)
        else:
            value = field.default_factory() if field.default is dataclasses.MISSING else field.default
            parser.set_defaults(**{field.name: value})

    @contextmanager
    def one_line_errors(self) -> Iterator[None]:
        """Within this context every error prints one line and exits with status 2."""
        try:
            yield
        except Exception as error:  # whatever argparse, the YAML reader or a dataclass raises
            self.error(one_line(error))

    def read(self, argv: Sequence[str]) -> tuple[list[Any], dict[str, str], list[str]]:
        """Parse options and the `--config` file; an option overrides the file.

        Returns:
            An instance of each dataclass; the unknown keys of the file with their values; and the unknown words of `argv`.
        """
        # TrlParser does not accept "--config=FILE", and fails with an IndexError on "--config" alone.
        first = argparse.ArgumentParser(prog=self.prog, usage=self.usage, add_help=False, allow_abbrev=False)
        first.add_argument("--config")
        known, rest = first.parse_known_args(argv)
        rest = ["--config", known.config, *rest] if known.config else rest
        how = {"return_remaining_strings": True, "separate_remaining_strings": True}
        *parsed, in_file, in_argv = self.parse_args_and_config(rest, **how)
        return parsed, {name_of(key): value for key, value in zip(in_file[::2], in_file[1::2], strict=True)}, in_argv

    def require_known(self, in_file: Mapping[str, str], in_argv: Sequence[str]) -> None:
        """Raise ValueError for unknown keys and words that `read` has returned."""
        words = [*(word for key, value in in_file.items() for word in (f"--{key}", value)), *in_argv]
        if refused := [name for name in map(name_of, words) if name in NOT_FOR_PIPELINES]:
            raise ValueError(f"{refused[0]} is no option for a pipeline; leave it out.")
        if words:
            help_option = "--help-all" if HOST in self.sections else "--help"
            near = difflib.get_close_matches(words[0], self._option_string_actions, 1, cutoff=0.8)
            meant = f" (did you mean {near[0]}?)" if near else ""
            raise ValueError(f"unknown options {' '.join(words)}{meant}; {self.prog} {help_option} lists all of them.")

    def format_help(self) -> str:
        """The help, with the sections in their order; the section of TrainingArguments is shown by `--help-all` only."""
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, self._actions, self._mutually_exclusive_groups)
        actions = {action.dest: action for action in reversed(self._actions)}  # keeps --NAME, which comes before its --no_NAME
        sections = {"options": ["help", "help_all", "config"], **self.sections}
        for title, names in sections.items():
            if title != HOST or self.shows_all:
                formatter.start_section(title)
                formatter.add_arguments([actions[name] for name in names if name in actions])
                formatter.end_section()
        return formatter.format_help()


def _value_of(name: str, hint: Any) -> str:
    """The placeholder for an option's value in the help."""
    kind = re.search(rf"\b({'|'.join(KINDS)})\b", str(hint))
    return f"{{{','.join(DTYPES)}}}" if name == "dtype" else KINDS[kind[0]] if kind else "TEXT"


class _HelpAll(argparse.Action):
    def __call__(self, parser: Any, *_: Any) -> None:
        parser.shows_all = True
        parser.print_help()
        parser.exit()


class _Formatter(argparse.HelpFormatter):
    """Shows one spelling of each option, the type of its value, and its default if it has one."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        shown = copy.copy(action)
        shown.option_strings = [word for word in action.option_strings if "-" not in word[2:]] or action.option_strings
        return super()._format_action_invocation(shown)

    def _get_help_string(self, action: argparse.Action) -> str:
        value = action.default
        if value in (None, argparse.SUPPRESS, [], "") or action.nargs == 0:
            return action.help or ""
        shown = " ".join(map(str, value)) if isinstance(value, list) else value
        return f"{action.help} (default: {shown})"
