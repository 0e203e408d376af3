"""Workers on two processes: how the tests start them, and how they end."""

import os
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed

TESTS = Path(__file__).parent
TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def run_worker(launcher, worker, *arguments):
    """`python -m <launcher> <file of the tests> <arguments>`, to its end; CalledProcessError if it fails."""
    paths = os.pathsep.join([str(TESTS.parent / "src"), str(TESTS)])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", *launcher, str(TESTS / worker), *arguments]
    subprocess.run(command, check=True, env=environment, timeout=300)


def leave():
    """The end of a worker, when everything is written.

    While Python winds up, torch aborts about one process in fifty here ("terminate called …").
    """
    torch.distributed.barrier()
    sys.stdout.flush()
    os._exit(0)
