"""Read an example's settings: from its recipe, then `--smoke`, then the command line, each overriding those before."""

from __future__ import annotations

import sys
from pathlib import Path

from diffusers_adjoint.cli.commands import Arguments, TrainArguments, parse_arguments

RECIPES = Path(__file__).parent / "recipes"


def read_arguments(name: str, script_type: type = TrainArguments) -> Arguments:
    """Settings from `recipes/<name>.yaml` (or `--config`), overridden by `--smoke`, and both by the command line.

    Args:
        name: of the example.
        script_type: dataclass of the example's own options.
    """
    argv = sys.argv[1:]
    if not any(word == "--config" or word.startswith("--config=") for word in argv):
        argv = ["--config", str(RECIPES / f"{name}.yaml"), *argv]
    if "--smoke" in argv:
        from smoke import smoke_options  # only in a checkout: it builds its tiny pipelines with code of the tests

        argv.remove("--smoke")
        argv = [*smoke_options(name), *argv]
    return parse_arguments(argv, script_type, prog=f"{name}.py [--smoke]")
