"""The program `diffusers-adjoint`: which command is meant. `--help` and `--version` answer at once, without torch."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import diffusers_adjoint

from .errors import PROGRAM, is_ours, one_line

__all__ = ["SUMMARIES", "main"]

SUMMARIES = {
    "train": "Fine-tune a pipeline on a reward; all options: train --help.",
    "evaluate": "Compare a fine-tuned model with its base: rewards, diversity, image statistics; all options: evaluate --help.",
    "demo": "Fine-tune a small pipeline that draws digits and compare it with the exact target; needs a checkout.",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status. Our own errors, being one sentence, are printed without a traceback."""
    argv = sys.argv[1:] if argv is None else argv
    name = _parser().parse_args(argv[:1]).command
    from .commands import COMMANDS

    try:
        return COMMANDS[name](argv[1:])
    except (ImportError, TypeError, ValueError) as error:
        if not is_ours(error):
            raise  # not a message of ours: the traceback is needed
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
