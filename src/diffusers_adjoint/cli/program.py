"""The program `diffusers-adjoint`: runs the command that is named. `--help` and `--version` do not import torch."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import diffusers_adjoint

from .errors import PROGRAM, is_ours, one_line

__all__ = ["SUMMARIES", "main"]

SUMMARIES = {
    "train": "Fine-tune a pipeline on a reward; train --help lists the options.",
    "evaluate": "Compare a fine-tuned model with its base: rewards, diversity, images; evaluate --help lists the options.",
    "demo": "Fine-tune a small pipeline that draws digits, and compare it with the exact target; needs a checkout.",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return the exit status. Errors that this package raises are printed in one line without a traceback."""
    argv = sys.argv[1:] if argv is None else argv
    name = _parser().parse_args(argv[:1]).command
    from .commands import COMMANDS

    try:
        return COMMANDS[name](argv[1:])
    except (ImportError, TypeError, ValueError) as error:
        if not is_ours(error):
            raise  # raised by another library or the user's code: the traceback is needed
        print(f"{PROGRAM}: error: {one_line(error)}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    commands = "\n".join(f"  {name:<10}{summary}" for name, summary in SUMMARIES.items())
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        usage=f"{PROGRAM} {{{','.join(SUMMARIES)}}} [--OPTION VALUE …]",
        description=f"Reward fine-tuning of diffusers pipelines with Adjoint Matching.\n\ncommands:\n{commands}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("command", choices=SUMMARIES, help=argparse.SUPPRESS)
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {diffusers_adjoint.__version__}")
    return parser
