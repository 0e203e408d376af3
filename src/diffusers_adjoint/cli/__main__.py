"""Entry point for `python -m diffusers_adjoint.cli` and `accelerate launch -m diffusers_adjoint.cli`."""

import sys

from .program import main

if __name__ == "__main__":
    sys.exit(main())
