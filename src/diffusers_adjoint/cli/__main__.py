"""`python -m diffusers_adjoint.cli`, which `accelerate launch -m` needs."""

import sys

from .program import main

if __name__ == "__main__":
    sys.exit(main())
