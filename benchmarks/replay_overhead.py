"""The cost of replaying the pipeline's `__call__`, compared with the denoiser call itself.

    python benchmarks/replay_overhead.py [name …]

For each family of `tests/families.py`, `predict` at one state is timed in turns with the bare network calls it makes (the same
modules with the arguments recorded from it, without gradient), after warm-up. Python's share is the difference of the medians;
on a real model it is the same number of milliseconds against tens or hundreds of them. It contains what the pipeline itself does
around the network (guidance arithmetic, concatenation, checks of its arguments).
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from families import FAMILIES, Family  # noqa: E402

from diffusers_adjoint import memoryless_scheduler  # noqa: E402
from diffusers_adjoint.replay import PipelineReplay  # noqa: E402

WARM_UP, REPEATS = 5, 40


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def measure(family: Family) -> tuple[float, float]:
    """Median seconds of predict, and of its denoiser calls alone."""
    pipeline = family.build()
    replay = PipelineReplay(
        pipeline,
        memoryless_scheduler(pipeline.scheduler),
        4,
        guidance_scale=family.guidance_scale,
        pipeline_kwargs=family.kwargs,
        component=family.component,
    )
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    replay.find_state(family.columns, generators)
    x, conditioning = replay.prepare(family.columns, generators)
    calls: list[tuple[torch.nn.Module, tuple[object, ...], dict[str, object]]] = []
    networks = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]  # ControlNets too
    handles = [part.register_forward_pre_hook(lambda *call: calls.append(call), with_kwargs=True) for part in networks]
    replay.predict(x, 1, conditioning)
    for handle in handles:
        handle.remove()

    def bare() -> None:
        for network, args, kwargs in calls:
            network(*args, **kwargs)

    def predict() -> None:
        replay.predict(x, 1, conditioning)

    for _ in range(WARM_UP):
        predict(), bare()
    pairs = [(seconds(predict), seconds(bare)) for _ in range(REPEATS)]
    return statistics.median(p for p, _ in pairs), statistics.median(b for _, b in pairs)


def main() -> None:
    torch.set_num_threads(1)
    chosen = [family for family in FAMILIES if not sys.argv[1:] or family.name in sys.argv[1:]]
    print("| family | predict, ms | denoiser, ms | ratio | Python, ms |\n|---|---|---|---|---|")
    overheads = []
    with torch.no_grad():
        for family in tqdm(chosen, leave=False, file=sys.stderr):
            replayed, bare = (1000 * value for value in measure(family))
            overheads.append(replayed - bare)
            tqdm.write(f"| {family.name} | {replayed:.2f} | {bare:.2f} | {replayed / bare:.2f} | {replayed - bare:.2f} |")
    print(f"\nPython per predict: median {statistics.median(overheads):.2f} ms, largest {max(overheads):.2f} ms.")


if __name__ == "__main__":
    main()
