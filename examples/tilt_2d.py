"""A gallery of tilts in the plane: three data sets, three rewards, and the exact answer beside each fine-tuned network.

    python examples/tilt_2d.py                 # about 3 minutes on one CPU thread; writes out/tilt_2d/tilt_2d.png
    python examples/tilt_2d.py --smoke         # the same in seconds, with networks that have learnt nothing

A small velocity network learns each data set from samples, by flow matching. A copy of it is then fine-tuned by Adjoint Matching
under memoryless noise, and sampled without noise. In the plane the law that this must give, p_base·e^r, is known without
training: weight samples of the base network by e^r. The table compares the two; the picture shows them side by side.
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.ndimage import gaussian_filter
from torch import Tensor, nn
from tqdm import tqdm

from diffusers_adjoint.metrics import TiltShift, tilt_shift
from diffusers_adjoint.soc import FLOW, PathSampler, memoryless_noise, solve

Reward = Callable[[Tensor], Tensor]
"""(B, 2) → (B,), differentiable."""

STRENGTH = 1.5
"""Standard deviation of every reward over base samples, nats: the mean moves far, and thousands of samples keep weight."""
DIRECTION = torch.tensor([0.8, 0.6])
"""Of the linear reward; as a point, the centre of the quadratic one."""


@dataclass(frozen=True)
class Settings:
    """Sizes and numbers of updates; the defaults make the published picture."""

    base_updates: int = 2000
    classifier_updates: int = 400
    updates: int = 250  # of fine-tuning
    steps: int = 30  # K, of the paths fine-tuned on
    loss_steps: int = 8
    batch: int = 512  # half of it leaves the two moons at .83 of the shift to their classifier: the adjoint has heavy tails there
    samples: int = 10_000


SMOKE = Settings(base_updates=20, classifier_updates=20, updates=2, steps=8, loss_steps=4, batch=32, samples=500)


def checkerboard(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The eight dark squares of a 4×4 board, (count, 2), labelled 1 in the lower left and the upper right quarter, (count,)."""
    column = torch.randint(4, (count,), generator=generator)
    row = 2 * torch.randint(2, (count,), generator=generator) + column % 2
    points = torch.stack([column, row], 1) - 2 + torch.rand(count, 2, generator=generator)
    return points, ((column < 2) == (row < 2)).long()


def two_moons(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Two interleaved half circles, labelled 1 for the upper one."""
    upper = torch.randint(2, (count,), generator=generator)
    angle = math.pi * torch.rand(count, generator=generator)
    circle = torch.stack([angle.cos(), angle.sin()], 1)
    points = torch.where(upper[:, None] > 0, circle, torch.tensor([1.0, 0.5]) - circle)
    points += 0.06 * torch.randn(count, 2, generator=generator)
    return (points - torch.tensor([0.5, 0.25])) * torch.tensor([1.3, 2.2]), upper


def six_gaussians(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Six petals around the origin, labelled 1 for the one on the right."""
    petal = torch.randint(6, (count,), generator=generator)
    angle = petal * math.pi / 3
    out, across = 1.6 + 0.28 * torch.randn(count, generator=generator), 0.14 * torch.randn(count, generator=generator)
    points = torch.stack([out * angle.cos() - across * angle.sin(), out * angle.sin() + across * angle.cos()], 1)
    return points, (petal == 0).long()


REWARDS = {
    "quadratic": "quadratic reward  −½‖x − μ‖²",
    "linear": "linear reward  c·x",
    "classifier": "classifier reward  log p(c | x)",
}
GALLERY = {"checkerboard": checkerboard, "two moons": two_moons, "six Gaussians": six_gaussians}


class Velocity(nn.Module):
    """v(x, t) of flow matching: x (B, 2), t () or (B, 1) → (B, 2)."""

    def __init__(self) -> None:
        super().__init__()
        # Waves of position and time; without them so small a network blurs the edges of the board.
        self.register_buffer("frequencies", math.pi * torch.tensor([0.5, 1.0, 2.0]))
        self.net = mlp(3 + 3 * 2 * 3, 64, 64, 64, 2)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        place = torch.cat([x, t.expand(len(x), 1)], 1)
        phase = (place[:, :, None] * self.frequencies).flatten(1)
        return self.net(torch.cat([place, phase.sin(), phase.cos()], 1))


def mlp(*sizes: int) -> nn.Sequential:
    layers = [layer for size in zip(sizes[:-1], sizes[1:], strict=True) for layer in (nn.Linear(*size), nn.SiLU())]
    return nn.Sequential(*layers[:-1])


def flow_matching_loss(net: nn.Module, points: Tensor, _: Tensor, generator: torch.Generator) -> Tensor:
    """Regresses X_1 − X_0 on X_t = t X_1 + (1 − t) X_0, X_1 the points."""
    start, t = torch.randn(points.shape, generator=generator), torch.rand(len(points), 1, generator=generator)
    return (net(t * points + (1 - t) * start, t) - (points - start)).square().sum(1).mean()


def classifier_loss(net: nn.Module, points: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
    """Cross-entropy of a logit. Noise on the inputs gives it a slope between the classes, which a reward needs."""
    noisy = points + 0.3 * torch.randn(points.shape, generator=generator)
    return nn.functional.binary_cross_entropy_with_logits(net(noisy)[:, 0], labels.float())


def fit(net: nn.Module, loss: Callable[..., Tensor], data: str, updates: int, rate: float, batch: int, seed: int) -> None:
    """Trains a network on points and labels drawn afresh for each update, then freezes it."""
    generator, optimizer = torch.Generator().manual_seed(seed), torch.optim.Adam(net.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    for _ in tqdm(range(updates), desc=f"{data}: {type(net).__name__}", leave=False):
        optimizer.zero_grad()
        loss(net, *GALLERY[data](batch, generator), generator).backward()
        optimizer.step()
        schedule.step()
    net.requires_grad_(False)


def make_rewards(classifier: nn.Module, base: Tensor) -> dict[str, Reward]:
    """The rewards in nats: deviation `STRENGTH` over base samples (N, 2), and mean 0, since a constant tilts nothing."""
    raw: dict[str, Reward] = {
        "quadratic": lambda x: -0.5 * (x - DIRECTION).square().sum(1),
        "linear": lambda x: x @ DIRECTION,
        "classifier": lambda x: nn.functional.logsigmoid(classifier(x)[:, 0]),
    }

    def scaled(reward: Reward) -> Reward:
        mean, scale = reward(base).mean(), STRENGTH / reward(base).std()
        return lambda x: scale * (reward(x) - mean)

    return {name: scaled(reward) for name, reward in raw.items()}


def fine_tune(base: Velocity, reward: Reward, settings: Settings, seed: int, name: str) -> Velocity:
    """A copy of the base network whose samples follow p_base·e^r."""
    tuned = copy.deepcopy(base).requires_grad_(True)
    u = torch.linspace(0, 1, settings.steps + 1)
    times = u / (u + 0.7 * (1 - u))  # finer towards the data, where the laws are narrow
    sampler = PathSampler(FLOW, memoryless_noise(FLOW), times)
    optimizer = torch.optim.Adam(tuned.parameters(), lr=5e-3, betas=(0.95, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.updates)
    with tqdm(total=settings.updates, desc=name, leave=False) as bar:

        def on_update(_: int, loss: Tensor) -> None:
            schedule.step()
            bar.update()

        solve(
            sampler.tilt(base, reward),
            sampler.mean(tuned),
            optimizer,
            start=lambda generator: torch.randn(settings.batch, 2, generator=generator),
            updates=settings.updates,
            num_loss_steps=settings.loss_steps,
            seed=seed,
            on_update=on_update,
        )
    return tuned


def sample(net: Velocity, count: int, seed: int) -> Tensor:
    """Points (count, 2) of the flow, without noise."""
    start = torch.randn(count, 2, generator=torch.Generator().manual_seed(seed))
    return PathSampler(FLOW, lambda t: 0.0, torch.linspace(0, 1, 51)).sample(net, start)[-1]


def resample(points: Tensor, log_weights: Tensor, seed: int) -> Tensor:
    """As many points, drawn from these with weights e^r."""
    return points[log_weights.softmax(0).multinomial(len(points), True, generator=torch.Generator().manual_seed(seed))]


def sliced_w2(first: Tensor, second: Tensor, directions: int = 32) -> float:
    """W2 of two equally large point sets, root mean square over projections to lines."""
    angles = torch.arange(directions) * math.pi / directions
    axes = torch.stack([angles.cos(), angles.sin()])
    return ((first @ axes).sort(0).values - (second @ axes).sort(0).values).square().mean().sqrt().item()


@dataclass(frozen=True)
class Row:
    """One data set under one reward.

    Args:
        shift: E[r] before (0) and after, its target, and the share of the way.
        w2_tuned, w2_base: distance of the samples to the exact tilt.
        w2_floor: distance of two exact tilts, resampled from different base samples: sampling error alone.
    """

    data: str
    reward: str
    shift: TiltShift
    w2_tuned: float
    w2_floor: float
    w2_base: float

    def __str__(self) -> str:
        target, share = self.shift.target, self.shift.fraction
        short = "  short of .9" if share is None or share.mean < 0.9 else ""
        numbers = [target, self.shift.after, "not estimable" if share is None else share]
        distances = [f"{w2:.3f}" for w2 in (self.w2_tuned, self.w2_floor, self.w2_base)]
        return line(self.data, self.reward, f"{target.effective_sample_size:.0%}", *numbers, *distances) + short


def line(*cells: object) -> str:
    return "  ".join(f"{cell!s:<{width}}" for cell, width in zip(cells, (13, 10, 4, 15, 15, 15, 8, 6, 6), strict=True))


HEADER = line("data", "reward", "ESS", "E[r] exact", "E[r] tuned", "share of shift", "W2 tuned", "floor", "base")


def compare(name: str, axes: list[Axes], settings: Settings, seed: int) -> list[Row]:
    """One row of the gallery: trains, fine-tunes three times, draws into seven axes."""
    torch.manual_seed(seed)
    net, classifier = Velocity(), mlp(2, 64, 64, 1)
    fit(net, flow_matching_loss, name, settings.base_updates, 1e-2, settings.batch, seed)
    fit(classifier, classifier_loss, name, settings.classifier_updates, 5e-3, settings.batch, seed)
    base, other = sample(net, settings.samples, seed + 1), sample(net, settings.samples, seed + 2)
    draw(axes[:1], {"base, E[r] = 0": base})
    axes[0].set_ylabel(name, fontsize=12)
    rows = []
    for i, (kind, reward) in enumerate(make_rewards(classifier, base).items()):
        tuned = sample(fine_tune(net, reward, settings, seed, f"{name}: {kind}"), settings.samples, seed + 3)
        exact, again = resample(base, reward(base), seed), resample(other, reward(other), seed + 1)
        shift = tilt_shift("r", "ODE", reward(base), reward(tuned), reward(base))
        rows.append(Row(name, kind, shift, *(sliced_w2(points, exact) for points in (tuned, again, other))))
        tqdm.write(str(rows[-1]))
        titles = f"exact, E[r] = {shift.target.mean:.2f}", f"tuned, E[r] = {shift.after.mean:.2f}"
        draw(axes[1 + 2 * i :], dict(zip(titles, (exact, tuned), strict=True)), reward)
    return rows


def draw(axes: list[Axes], panels: dict[str, Tensor], reward: Reward | None = None, half_width: float = 2.6) -> None:
    """Densities of point sets by title, on one colour scale, with level lines of the reward, dashed below its mean of 0."""
    edges, middles = (torch.linspace(-half_width, half_width, n) for n in (101, 60))
    histograms = [torch.histogramdd(points, bins=[edges, edges]).hist.T.numpy() for points in panels.values()]
    images = [gaussian_filter(histogram, 1.0) ** 0.5 for histogram in histograms]  # the root keeps what is faint visible
    for ax, title, image in zip(axes, panels, images, strict=False):
        span = (-half_width, half_width) * 2
        top = max(image.max() for image in images)
        ax.imshow(image, origin="lower", extent=span, cmap="magma", vmin=0, vmax=top, interpolation="bilinear")
        if reward is not None:
            grid = torch.stack(torch.meshgrid(middles, middles, indexing="xy"), -1).flatten(0, 1)
            ax.contour(middles, middles, reward(grid).view(60, 60), 8, colors="white", linewidths=0.6, alpha=0.4)
        ax.set_title(title, fontsize=10, pad=4)
        ax.set(xticks=[], yticks=[])


def empty_picture() -> tuple[Figure, list[list[Axes]]]:
    """A row of seven axes for each data set: the base, and a pair under the name of each reward."""
    gap, layout = 0.14, {"left": 0.025, "right": 0.998, "bottom": 0.01, "top": 0.895, "wspace": 0.04, "hspace": 0.16}
    figure, grid = plt.subplots(
        len(GALLERY), 10, figsize=(12, 5.7), gridspec_kw={"width_ratios": [1, *[gap, 1, 1] * 3], **layout}
    )
    for spacer in grid[:, 1::3].flat:
        spacer.remove()
    for heading, left, right in zip(REWARDS.values(), grid[0, 2::3], grid[0, 3::3], strict=True):
        middle = (left.get_position().x0 + right.get_position().x1) / 2
        figure.text(middle, 0.955, heading, ha="center", fontsize=12)
    return figure, [[row[i] for i in (0, 2, 3, 5, 6, 8, 9)] for row in grid]


def run(settings: Settings, output_dir: Path, seed: int = 0) -> list[Row]:
    """The whole gallery: prints the table line by line, writes tilt_2d.png."""
    figure, grid = empty_picture()
    print(HEADER)
    rows = [row for name, axes in zip(GALLERY, grid, strict=True) for row in compare(name, axes, settings, seed)]
    output_dir.mkdir(parents=True, exist_ok=True)
    figure.savefig(output_dir / "tilt_2d.png", dpi=100)
    plt.close(figure)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--smoke", action="store_true", help="the same in seconds, with networks that have learnt nothing")
    parser.add_argument("--output_dir", type=Path, default=Path("out/tilt_2d"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # more of them only slow so small networks down
    run(SMOKE if arguments.smoke else Settings(), arguments.output_dir)


if __name__ == "__main__":
    main()
