"""The command line `diffusers-adjoint`. Scripts that read their own recipes can use the functions in `commands`."""

from .program import main

__all__ = ["main"]
