r"""Why the noise must be memoryless: Figure 2 of the paper (arXiv 2409.08861), trained on a CPU.

    python examples/figure2_memoryless.py              # about 80 s on one CPU thread; needs matplotlib
    python examples/figure2_memoryless.py --smoke      # the same code in seconds; its numbers mean nothing

A flow model on the line is fine-tuned on r(x) = 0.9 x three times, and only the noise of the sampler differs: σ = 0.2, σ = 1 and
the memoryless σ = √(2(1 − t)/t). Each solves its control problem, and samples p_base·e^{r(x_1) + V(x_0)}. Only where x_1 has
forgotten x_0 is that the tilt p_base·e^r. Two tables and a picture, in --output_dir (default out/figure2_memoryless):

1. Base 0.3 N(−1.5, 0.2) + 0.7 N(1, 0.5), a stand-in since the paper does not say what it drew: memory, and distances of the
   samples to the exact tilt, drawn with the noise of training and as an ODE (σ = 0), as only memoryless training allows (Thm. 1).
   Total variation .35, .08 and .02 with the three noises, .01 of it left by the number of samples; as ODE .35, .16 and .03.
2. Base N(0, 0.8²), where the bias has a closed form: of the tilt's shift, the share 1 − exp(−πσ²/2s) is reached. Training comes
   within .02 of it, and the grid of 40 steps alone makes up to .016 of that.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Categorical, MixtureSameFamily, Normal
from tqdm import tqdm

from diffusers_adjoint.soc import FLOW, PathSampler, check_noise, correlation, leftover_memory, memoryless_noise, solve

torch.set_num_threads(1)  # on tensors this small a second thread only waits for the first

NOISES = {"σ = 0.2": lambda t: 0.2, "σ = 1": lambda t: 1.0, "memoryless": memoryless_noise(FLOW)}
SLOPE = 0.9  # of the reward, nats per unit of x
BINS = torch.linspace(-4.0, 5.0, 91, dtype=torch.float64)  # 0.1 wide: of the histograms, and of the total variation


def mixture(weights: Tensor, means: Tensor, variances: Tensor) -> MixtureSameFamily:
    """Σ_i w_i N(m_i, s_i²) on the line, of tensors (n,)."""
    return MixtureSameFamily(Categorical(weights), Normal(means, variances.sqrt()))


BASE = mixture(*torch.tensor([[0.3, 0.7], [-1.5, 1.0], [0.2, 0.5]], dtype=torch.float64))
GAUSSIAN = mixture(*torch.tensor([[1.0], [0.0], [0.64]], dtype=torch.float64))


def tilted(law: MixtureSameFamily) -> MixtureSameFamily:
    """law·e^{SLOPE·x}/Z, again a mixture."""
    means, variances = law.component_distribution.mean, law.component_distribution.variance
    weights = law.mixture_distribution.probs * (SLOPE * means + 0.5 * SLOPE**2 * variances).exp()
    return mixture(weights, means + SLOPE * variances, variances)


def exact_velocity(law: MixtureSameFamily) -> Callable[[Tensor, Tensor], Tensor]:
    """v(x, t) = E[X_1 − X_0 | X_t = x] for X_1 ~ law: what a perfectly trained flow model predicts, (B, 1) → (B, 1).

    In each component X_t is a Gaussian of variance S = t²s² + (1 − t)²; x tells by Bayes' rule which one it comes from.
    """
    components = law.component_distribution
    weights, means, variances = (p.float() for p in (law.mixture_distribution.probs, components.mean, components.variance))

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        spread, offset = t**2 * variances + (1 - t) ** 2, x - t * means  # (n,), (B, n)
        belongs = (weights.log() - 0.5 * spread.log() - 0.5 * offset**2 / spread).softmax(1)
        return (belongs * (means + (t * variances - (1 - t)) / spread * offset)).sum(1, keepdim=True)

    return velocity


class TunedVelocity(nn.Module):
    """The base's velocity plus a small network, zero at first: x (B, 1), t 0-dimensional → (B, 1)."""

    def __init__(self, base: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.base = base
        hidden = [nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh()]
        self.net = nn.Sequential(*hidden, nn.Linear(64, 1, bias=False))
        nn.init.zeros_(self.net[-1].weight)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        features = torch.stack([t, (math.pi * t).sin(), (math.pi * t).cos()]).expand(len(x), 3)
        # At t = 1 every law has the velocity v(x) = x, tilted or not: the factor spares the network learning that.
        return self.base(x, t) + (1 - t) * self.net(torch.cat([x, features], 1))


def fine_tune(law: MixtureSameFamily, name: str, updates: int, steps: int, batch: int, seed: int) -> TunedVelocity:
    """Adjoint Matching on r(x) = SLOPE·x with one of the noise schedules."""
    torch.manual_seed(seed)
    base = exact_velocity(law)
    model, sampler = TunedVelocity(base), PathSampler(FLOW, NOISES[name], torch.linspace(0, 1, steps + 1))
    # The first two noises are wrong on purpose: the library refuses them unless told so, and warns.
    problem = sampler.tilt(base, lambda x: SLOPE * x[:, 0], allow_biased_schedule=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)  # to 0: late updates average out their noise
    bar = tqdm(total=updates, desc=f"fine-tuning, {name}", unit=" updates")

    def start(generator: torch.Generator) -> Tensor:
        return torch.randn(batch, 1, generator=generator)

    def on_update(_: int, loss: Tensor) -> None:
        schedule.step()
        bar.update()

    solve(problem, sampler.mean(model), optimizer, start, updates, num_loss_steps=16, seed=seed, on_update=on_update)
    bar.close()
    return model


def draw(velocity: Callable[[Tensor, Tensor], Tensor], noise: Callable, samples: int, steps: int, seed: int) -> Tensor:
    """Paths x_0 … x_K, shape (K + 1, N); one seed gives every model the same starts and the same noise."""
    generator = torch.Generator().manual_seed(seed)
    sampler = PathSampler(FLOW, noise, torch.linspace(0, 1, steps + 1))
    return sampler.sample(velocity, torch.randn(samples, 1, generator=generator), generator)[..., 0]


@dataclass(frozen=True)
class Fit:
    """Samples (N,) and their distance to a law: total variation of the shares in BINS, and W2 of sorted samples and quantiles."""

    samples: Tensor
    total_variation: float
    w2: float

    @classmethod
    def to(cls, law: MixtureSameFamily, samples: Tensor) -> Fit:
        samples, points = samples.double(), torch.linspace(-8.0, 8.0, 20_001, dtype=torch.float64)
        shares = torch.bincount(torch.bucketize(samples, BINS), minlength=len(BINS) + 1) / len(samples)
        expected = torch.cat([torch.zeros(1), law.cdf(BINS), torch.ones(1)]).diff()
        levels = (torch.arange(len(samples), dtype=torch.float64) + 0.5) / len(samples)
        quantiles = torch.from_numpy(np.interp(levels, law.cdf(points), points))
        w2 = (samples.sort().values - quantiles).square().mean().sqrt().item()
        return cls(samples, 0.5 * (shares - expected).abs().sum().item(), w2)

    def __str__(self) -> str:
        return f"{self.total_variation:8.3f}{self.w2:7.3f}{self.samples.mean().item():8.3f}"


@dataclass(frozen=True)
class Row:
    """A model: memory (predicted for Gaussian data of variance 1; measured), samples, and paths (K + 1, N) with noise."""

    name: str
    predicted: float
    measured: float
    with_noise: Fit
    as_ode: Fit
    paths: Tensor

    def __str__(self) -> str:
        return f"{self.name:12}{self.predicted:12.3f}{self.measured:12.3f}  {self.with_noise}  {self.as_ode}"


def run(updates: int, samples: int, steps: int = 40, batch: int = 512, seed: int = 0) -> list[Row]:
    """The base, and the model that is fine-tuned with each noise schedule."""
    rows, target = [], tilted(BASE)
    for name in ("base", *NOISES):
        velocity = exact_velocity(BASE) if name == "base" else fine_tune(BASE, name, updates, steps, batch, seed)
        noise = NOISES["memoryless" if name == "base" else name]
        paths, ode = (draw(velocity, kind, samples, steps, seed + 1) for kind in (noise, lambda t: 0.0))
        memory = check_noise(FLOW, noise).leftover_memory, correlation(paths[0], paths[-1])
        rows.append(Row(name, *memory, Fit.to(target, paths[-1]), Fit.to(target, ode[-1]), paths))
    return rows


def gaussian_shares(updates: int, samples: int, steps: int = 40, seed: int = 0) -> dict[str, tuple[float, float]]:
    """For each noise schedule, the share of the tilt's shift SLOPE·s² that is reached, and the formula's (continuous time)."""
    shares, variance = {}, GAUSSIAN.variance.item()
    for name, noise in NOISES.items():
        model = fine_tune(GAUSSIAN, name, updates, steps, batch=32, seed=seed)  # the adjoint is the same on all paths
        tuned, base = (draw(velocity, noise, samples, steps, seed + 1)[-1].mean().item() for velocity in (model, model.base))
        formula = 1 - leftover_memory(FLOW, noise, variance) ** 2  # for a number σ this is 1 − exp(−πσ²/2s)
        shares[name] = ((tuned - base) / (SLOPE * variance), formula)
    return shares


def save_picture(rows: list[Row], path: Path, shown: int = 40) -> None:
    """For each noise: paths, coloured by where they start, and the densities of their end points."""
    figure, axes = plt.subplots(1, 6, figsize=(11, 4.2), sharey=True, layout="constrained", width_ratios=[3, 1.2] * 3)
    x, target = torch.linspace(-3.2, 4.2, 400, dtype=torch.float64), tilted(BASE)
    for row, left, right in zip(rows[1:], axes[::2], axes[1::2], strict=True):
        for each in row.paths[:, :shown].T:
            left.plot(torch.linspace(0, 1, len(each)), each, color=plt.cm.viridis((each[0].item() + 2) / 4), linewidth=0.8)
        left.set_title(f"{row.name}: corr(x₀, x₁) = {round(row.measured, 2) + 0.0:.2f}", fontsize=11)  # + 0.0: no "-0.00"
        left.set(xlabel="t", xlim=(0, 1), xticks=[0, 0.5, 1], xticklabels=["0", "½", "1"], ylim=(x[0], x[-1]))
        bars = {"bins": BINS, "density": True, "orientation": "horizontal"}
        right.hist(row.with_noise.samples, **bars, color="tab:orange", alpha=0.5, label="fine-tuned, this noise")
        right.hist(row.as_ode.samples, **bars, histtype="step", color="tab:blue", label="fine-tuned, as ODE")
        right.plot(BASE.log_prob(x).exp(), x, color="grey", label="base")
        right.plot(target.log_prob(x).exp(), x, color="black", linestyle="--", label="exact tilt")
        right.set(xticks=[], xlabel="density")
        right.tick_params(left=False)
    axes[0].set_ylabel("x, coloured by its start")
    figure.legend(*axes[1].get_legend_handles_labels(), loc="outside lower center", ncol=4, frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a few updates and samples")
    parser.add_argument("--output_dir", type=Path, default=Path("out/figure2_memoryless"))
    arguments = parser.parse_args()
    samples = 1_000 if arguments.smoke else 40_000
    rows = run(3 if arguments.smoke else 250, samples)
    shares = gaussian_shares(3 if arguments.smoke else 80, samples // 10)

    torch.manual_seed(0)
    target = tilted(BASE)
    print(f"\nMixture: the tilt moves the mean from {BASE.mean.item():.3f} to {target.mean.item():.3f}.\n")
    print(f"{'':12}{'correlation, x_0 and x_1':>24}  {'with its noise':^23}  {'as ODE':^23}")
    print(f"{'':12}{'Gaussian':>12}{'measured':>12}" + f"  {'TV':>8}{'W2':>7}{'mean':>8}" * 2)
    print(*rows, sep="\n")
    print(f"{'as many exact samples':36}  {Fit.to(target, target.sample((samples,)))}")
    print("\nGaussian: share of the tilt's shift that is reached.\n")
    print(f"{'':12}{'trained':>12}{'formula':>12}")
    for name, (reached, formula) in shares.items():
        print(f"{name:12}{reached:12.3f}{formula:12.3f}")
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    save_picture(rows, arguments.output_dir / "figure2_memoryless.png")


if __name__ == "__main__":
    main()
