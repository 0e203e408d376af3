"""The command line `diffusers-adjoint`. Its parts for scripts with a recipe of their own are in `commands`."""

from .program import main

__all__ = ["main"]
