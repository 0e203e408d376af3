r"""Problems with known answers: what fine-tuning must reach, in closed form, for tests, examples and docs alike.

Base laws are Gaussian mixtures p = Σ w_i N(m_i, C_i) on R^d (one component: a Gaussian), rewards are quadratic,
r(x) = c·x − ½ (x − μ)ᵀ Q (x − μ). Then everything that Adjoint Matching needs or produces is elementary:

- the noised law of X = α X_1 + β X_0 is the mixture with means α m_i and covariances S_i = α² C_i + β² I, so the exact
  denoiser, and with it every prediction type, is known (`GaussianMixture.denoise`, `model_output`);
- the tilted law p* ∝ p e^r is again a mixture (`GaussianMixture.tilt`);
- a sampler applied to a Gaussian law is an affine chain, whose optimal control is a discrete Riccati recursion
  (`AffineChain`): exact on the grid, no step-size error.

Beyond samplers, two problems of stochastic optimal control, min_u E[∫_0^1 ½‖u‖² + f(X, t) dt + g(X_1)] under
dX = (b(X, t) + σ u) dt + σ dB (of the kinds in arXiv 2312.02027; here with ½ before quadratic costs):

- `LinearQuadratic`: optimal control by the matrix exponential; P = Q = 0 leaves the Ornstein–Uhlenbeck process with a linear
  terminal cost, whose control is the deterministic −σ ∘ exp(Aᵀ(1 − t)) q;
- `DoubleWell`: not Gaussian, one dimension; optimal control by the linear equation of ψ = e^{−V}, on a grid (`hopf_cole`).

Nothing here imports the package: these are the references it is checked against.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from scipy.linalg import solve_banded
from torch import Tensor

__all__ = [
    "AffineChain",
    "DoubleWell",
    "GaussianMixture",
    "LinearQuadratic",
    "QuadraticReward",
    "gaussian",
    "hopf_cole",
    "mixture_1d",
    "model_output",
    "sliced_w2",
]


@dataclass(frozen=True)
class QuadraticReward:
    """r(x) = c·x − ½ (x − μ)ᵀ Q (x − μ), nats. Q = 0 is the linear reward.

    Args:
        slope: c, shape (d,).
        curvature: Q, shape (d, d), symmetric.
        centre: μ, shape (d,).
    """

    slope: Tensor
    curvature: Tensor
    centre: Tensor

    @classmethod
    def linear(cls, slope: Tensor) -> QuadraticReward:
        return cls(slope, slope.new_zeros(len(slope), len(slope)), torch.zeros_like(slope))

    def __call__(self, x: Tensor) -> Tensor:
        """(B, d) → (B,)."""
        away = x - self.centre
        return x @ self.slope - 0.5 * (away @ self.curvature * away).sum(-1)

    def grad(self, x: Tensor) -> Tensor:
        """∇r, (…, d) → (…, d)."""
        return self.slope - (x - self.centre) @ self.curvature

    def to(self, dtype: torch.dtype) -> QuadraticReward:
        return QuadraticReward(self.slope.to(dtype), self.curvature.to(dtype), self.centre.to(dtype))

    def scaled(self, factor: float) -> QuadraticReward:
        """λ r."""
        return QuadraticReward(factor * self.slope, factor * self.curvature, self.centre)


@dataclass(frozen=True)
class GaussianMixture:
    """Σ w_i N(m_i, C_i) on R^d.

    Args:
        weights: w_i, shape (n,), sum 1.
        means: m_i, shape (n, d).
        covariances: C_i, shape (n, d, d).
    """

    weights: Tensor
    means: Tensor
    covariances: Tensor

    def log_prob(self, x: Tensor) -> Tensor:
        """(B, d) → (B,)."""
        return torch.logsumexp(self._log_joint(x)[0], -1)

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """(count, d)."""
        which = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        noise = torch.randn(count, self.means.shape[1], generator=generator, dtype=self.means.dtype)
        return self.means[which] + torch.einsum("bij,bj->bi", torch.linalg.cholesky(self.covariances)[which], noise)

    def mean(self) -> Tensor:
        return self.weights @ self.means

    def covariance(self) -> Tensor:
        away = self.means - self.mean()
        return torch.einsum("n,nij->ij", self.weights, self.covariances + away[:, :, None] * away[:, None, :])

    def to(self, dtype: torch.dtype) -> GaussianMixture:
        return GaussianMixture(self.weights.to(dtype), self.means.to(dtype), self.covariances.to(dtype))

    def noised(self, alpha: float, beta: float) -> GaussianMixture:
        """Law of α X_1 + β X_0 with X_0 ~ N(0, I) independent of X_1."""
        eye = torch.eye(self.means.shape[1], dtype=self.means.dtype)
        return GaussianMixture(self.weights, alpha * self.means, alpha**2 * self.covariances + beta**2 * eye)

    def score(self, x: Tensor) -> Tensor:
        """∇ log p, (B, d) → (B, d)."""
        log_joint, whitened = self._log_joint(x)
        return -(torch.softmax(log_joint, -1)[..., None] * whitened).sum(1)

    def denoise(self, x: Tensor, alpha: float, beta: float) -> tuple[Tensor, Tensor]:
        """E[X_1 | x] and E[X_0 | x] at x = α X_1 + β X_0, each (B, d); regular at both ends, α = 0 and β = 0."""
        log_joint, whitened = self.noised(alpha, beta)._log_joint(x)
        posterior = torch.softmax(log_joint, -1)[..., None]
        data = self.means + alpha * torch.einsum("nij,bnj->bni", self.covariances, whitened)
        return (posterior * data).sum(1), (posterior * beta * whitened).sum(1)

    def tilt(self, reward: QuadraticReward) -> tuple[GaussianMixture, Tensor]:
        """The target p* ∝ p e^r, and log Z = log E_p[e^r].

        With g = ∇r(m_i): C_i* = (C_i⁻¹ + Q)⁻¹, m_i* = m_i + C_i* g and
        log Z_i = r(m_i) + ½ gᵀ C_i* g − ½ log det(I + C_i Q).
        """
        eye = torch.eye(self.means.shape[1], dtype=self.means.dtype)
        covariances = torch.linalg.inv(torch.linalg.inv(self.covariances) + reward.curvature)
        slope = reward.grad(self.means)
        shift = torch.einsum("nij,nj->ni", covariances, slope)
        log_z = reward(self.means) + 0.5 * (slope * shift).sum(-1)
        log_z = log_z - 0.5 * torch.logdet(eye + self.covariances @ reward.curvature)
        log_weights = self.weights.log() + log_z
        return GaussianMixture(log_weights.softmax(0), self.means + shift, covariances), log_weights.logsumexp(0)

    def _log_joint(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """log w_i N(x; m_i, C_i), shape (B, n), and C_i⁻¹ (x − m_i), shape (B, n, d)."""
        away = x[:, None, :] - self.means
        whitened = torch.einsum("nij,bnj->bni", torch.linalg.inv(self.covariances), away)
        log_norm = 0.5 * (torch.logdet(self.covariances) + x.shape[1] * math.log(2 * math.pi))
        return self.weights.log() - log_norm - 0.5 * (away * whitened).sum(-1), whitened


def gaussian(mean: Tensor, covariance: Tensor) -> GaussianMixture:
    """N(mean, covariance) with mean (d,), covariance (d, d)."""
    return GaussianMixture(mean.new_ones(1), mean[None], covariance[None])


def mixture_1d(weights: list[float], means: list[float], variances: list[float]) -> GaussianMixture:
    """Mixture on the line, float64."""
    as_tensor = lambda values: torch.tensor(values, dtype=torch.float64)  # noqa: E731
    return GaussianMixture(as_tensor(weights), as_tensor(means)[:, None], as_tensor(variances)[:, None, None])


def model_output(law: GaussianMixture, x: Tensor, alpha: float, beta: float, prediction_type: str) -> Tensor:
    """What a perfectly trained network says at x = α X_1 + β X_0, in diffusers' conventions, (B, d)."""
    data, noise = law.denoise(x, alpha, beta)
    outputs = {
        "flow_prediction": noise - data,
        "epsilon": noise,
        "sample": data,
        "v_prediction": alpha * noise - beta * data,
    }
    return outputs[prediction_type]


@dataclass(frozen=True)
class AffineChain:
    """x_{k+1} = A_k x_k + b_k + s_k (w_k + ξ_k): a sampler on a Gaussian law, with control w_k at cost ½‖w_k‖².

    Args:
        jacobians: A_k, shape (K, d, d).
        offsets: b_k, shape (K, d).
        stds: s_k ≥ 0, shape (K,), or (K, d) for a diagonal that acts coordinate by coordinate.
    """

    jacobians: Tensor
    offsets: Tensor
    stds: Tensor

    @classmethod
    def of(cls, mean: Callable[[int, Tensor], Tensor], stds: Tensor, dim: int) -> AffineChain:
        """Read A_k, b_k off a step mean that is affine, by evaluating it at 0 and at the unit vectors."""
        probes = torch.cat([torch.zeros(1, dim, dtype=torch.float64), torch.eye(dim, dtype=torch.float64)])
        values = torch.stack([mean(k, probes) for k in range(len(stds))])
        return cls((values[:, 1:] - values[:, :1]).transpose(1, 2), values[:, 0], stds)

    def carry(self) -> Tensor:
        """P_k = ∂x_K/∂x_k = A_{K−1} … A_k, shape (K + 1, d, d)."""
        products = [torch.eye(self.offsets.shape[1], dtype=self.offsets.dtype)]
        for jacobian in self.jacobians.flip(0):
            products.append(products[-1] @ jacobian)
        return torch.stack(products[::-1])

    def terminal_law(self, start: Tensor, start_covariance: Tensor | None = None) -> GaussianMixture:
        """Law of x_K from x_0 ~ N(start, start_covariance) (a point, by default) without control."""
        mean, covariance = start, torch.zeros_like(self.jacobians[0]) if start_covariance is None else start_covariance
        for jacobian, offset, std in zip(self.jacobians, self.offsets, self.stds, strict=True):
            mean = jacobian @ mean + offset
            covariance = jacobian @ covariance @ jacobian.T + std**2 * torch.eye(len(mean), dtype=mean.dtype)
        return gaussian(mean, covariance)

    def optimal_control(self, reward: QuadraticReward, running: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Gains G_k (K, d, d) and offsets g_k (K, d) of the best control w_k* = G_k x_k + g_k.

        It minimises E[Σ ½‖w_k‖² + ½ x_kᵀ P_k x_k − r(x_K)]; P_k, shape (K, d, d), symmetric, is `running` (step length
        included), zero by default. Riccati: with value ½ xᵀ M x + l·x after the step and S = diag(s),
        w* = −S (I + M S²)⁻¹ (M (A x + b) + l).
        """
        curvature, slope = reward.curvature, -reward.grad(torch.zeros_like(reward.centre))
        eye = torch.eye(len(slope), dtype=slope.dtype)
        gains, offsets = [], []
        for k in reversed(range(len(self.stds))):
            jacobian, offset, std = self.jacobians[k], self.offsets[k], self.stds[k]
            damped = torch.linalg.inv(eye + curvature * std**2)
            gains.append(-std[..., None] * (damped @ curvature @ jacobian))
            offsets.append(-std * (damped @ (curvature @ offset + slope)))
            slope = jacobian.T @ damped @ (curvature @ offset + slope)
            curvature = jacobian.T @ damped @ curvature @ jacobian
            if running is not None:
                curvature = curvature + running[k]
        return torch.stack(gains[::-1]), torch.stack(offsets[::-1])

    def controlled(self, gains: Tensor, offsets: Tensor) -> AffineChain:
        """The chain under w_k = G_k x_k + g_k."""
        std = self.stds.reshape(len(self.stds), -1)  # a column, or one entry per coordinate
        return AffineChain(self.jacobians + std[..., None] * gains, self.offsets + std * offsets, self.stds)

    def mean(self, k: int, x: Tensor) -> Tensor:
        """Step mean, (B, d) → (B, d)."""
        return x @ self.jacobians[k].T + self.offsets[k]


@dataclass(frozen=True)
class LinearQuadratic:
    """dX = (A X + σ u) dt + σ dB on [0, 1], costs f = ½ xᵀ P x and g = ½ xᵀ Q x + q·x. Everything float64.

    Args:
        matrix: A, shape (d, d).
        running: P ≥ 0, shape (d, d), symmetric.
        terminal: Q ≥ 0, shape (d, d), symmetric.
        slope: q, shape (d,).
        sigma: σ, diagonal, shape (d,).
    """

    matrix: Tensor
    running: Tensor
    terminal: Tensor
    slope: Tensor
    sigma: Tensor

    def drift(self, x: Tensor, t: float | Tensor) -> Tensor:
        """b, (B, d) → (B, d)."""
        return x @ self.matrix.T

    def running_cost(self, x: Tensor, t: float | Tensor) -> Tensor:
        """f, (B, d) → (B,)."""
        return 0.5 * (x @ self.running * x).sum(-1)

    def terminal_cost(self, x: Tensor) -> Tensor:
        """g, (B, d) → (B,)."""
        return 0.5 * (x @ self.terminal * x).sum(-1) + x @ self.slope

    def control(self, x: Tensor, t: float | Tensor) -> Tensor:
        """u* = −σ ∘ (F_t x + f_t), (B, d) → (B, d).

        The Riccati equation −Ḟ = AᵀF + F A − F σ² F + P, F_1 = Q, −ḟ = (Aᵀ − F σ²) f, f_1 = q, linearised: along the optimal
        mean path the state x and the costate p = F x + f obey ẋ = A x − σ² p, ṗ = −P x − Aᵀ p, so that one matrix
        exponential carries (x_1, Q x_1 + q) back to time t.
        """
        d = len(self.slope)
        flow = torch.cat([torch.cat([self.matrix, -torch.diag(self.sigma**2)], 1), torch.cat([-self.running, -self.matrix.T], 1)])
        back = torch.linalg.matrix_exp(flow * (t - 1))
        of_end = back[:, :d] + back[:, d:] @ self.terminal  # ∂(x_t, p_t)/∂x_1
        gain = of_end[d:] @ torch.linalg.inv(of_end[:d])
        offset = (back[d:, d:] - gain @ back[:d, d:]) @ self.slope
        return -self.sigma * (x @ gain.T + offset)

    def chain(self, times: Tensor) -> AffineChain:
        """Euler steps over t_0 < … < t_K, `times` of shape (K + 1,): A_k = I + h A, b_k = 0, s_k = √h σ."""
        h = times.diff()
        eye = torch.eye(len(self.slope), dtype=times.dtype)
        return AffineChain(
            eye + h[:, None, None] * self.matrix, times.new_zeros(len(h), len(eye)), h.sqrt()[:, None] * self.sigma
        )

    def chain_costs(self, times: Tensor) -> tuple[QuadraticReward, Tensor]:
        """What `chain(times).optimal_control` takes: the reward −g, and P_k = h P, shape (K, d, d)."""
        reward = QuadraticReward(-self.slope, self.terminal, torch.zeros_like(self.slope))
        return reward, times.diff()[:, None, None] * self.running


@dataclass(frozen=True)
class DoubleWell:
    """dX = (−Ψ'(X) + σ u) dt + σ dB on [0, 1], d = 1, with Ψ = κ (x² − 1)², f = 0 and g = ν (x − 1)².

    Mass above 0 at the end, without control and under the optimum: .5 and .98 from x_0 = 0, .08 and .81 from x_0 = −1.
    The grid's own error in u* is 4e-4 for |x| ≤ 1.5, 6e-3 for |x| ≤ 2 (there u* reaches 9), against one four times as fine.

    Args:
        barrier: κ, the height of Ψ at 0.
        pull: ν.
        sigma: σ.
    """

    barrier: float = 1.0
    pull: float = 1.5
    sigma: float = 1.0

    def drift(self, x: Tensor, t: float | Tensor) -> Tensor:
        """b = −Ψ', (B, 1) → (B, 1)."""
        return -4 * self.barrier * x * (x**2 - 1)

    def terminal_cost(self, x: Tensor) -> Tensor:
        """g, (B, 1) → (B,)."""
        return self.pull * (x[:, 0] - 1) ** 2

    def control(self, x: Tensor, t: float | Tensor) -> Tensor:
        """u* = −σ V', (B, 1) → (B, 1); |x| ≤ 3, as at the border beyond."""
        points, _, slopes = self._solution
        return -self.sigma * _bilinear(points, slopes, x, t)

    def value(self, x: Tensor, t: float | Tensor = 0.0) -> Tensor:
        """V = −log ψ = E[cost from (x, t) on] under u*, (B, 1) → (B,)."""
        points, values, _ = self._solution
        return _bilinear(points, values, x, t)[:, 0]

    @cached_property
    def _solution(self) -> tuple[Tensor, Tensor, Tensor]:
        """Grid, V and V' on it."""
        points, values = hopf_cole(self.drift, self.terminal_cost, self.sigma)
        return points, values, torch.gradient(values, spacing=(points,), dim=1, edge_order=2)[0]


def hopf_cole(
    drift: Callable[[Tensor, float], Tensor],
    terminal_cost: Callable[[Tensor], Tensor],
    sigma: float,
    half_width: float = 3.0,
    points: int = 1201,
    steps: int = 1000,
) -> tuple[Tensor, Tensor]:
    """Value V of dX = (b + σ u) dt + σ dB at cost E[∫_0^1 ½ u² dt + g(X_1)], d = 1: grid (N,), and V at k/K (K + 1, N).

    ψ = e^{−V} obeys ∂_t ψ + b ψ' + ½ σ² ψ'' = 0, ψ(·, 1) = e^{−g} (Fleming and Soner, "Controlled Markov Processes and
    Viscosity Solutions", chapter VI): central differences and Crank–Nicolson, second order in space and time. The grid spans
    ±`half_width`; there the drift must point inwards, and carries ψ alone: a path that far out does not stay. b is the same
    at all times.
    """
    x = torch.linspace(-half_width, half_width, points, dtype=torch.float64)
    dx, half = 2 * half_width / (points - 1), 0.5 / steps
    psi = torch.exp(-terminal_cost(x[:, None]))
    history = [psi]
    b = drift(x[:, None], 0.0)[:, 0]
    left, right = (half * (0.5 * (sigma / dx) ** 2 + sign * b / (2 * dx)) for sign in (-1, 1))
    left[0], right[0], left[-1], right[-1] = 0, half * b[0] / dx, -half * b[-1] / dx, 0
    # `roll` brings the neighbour's value; what it carries round the ends meets a zero coefficient.
    bands = torch.stack([-right.roll(1), 1 + left + right, -left.roll(-1)]).numpy()
    for _ in range(steps):
        known = psi + left * (psi.roll(1) - psi) + right * (psi.roll(-1) - psi)
        psi = torch.from_numpy(solve_banded((1, 1), bands, known.numpy()))
        history.append(psi)
    return x, -torch.stack(history[::-1]).log()


def _bilinear(points: Tensor, table: Tensor, x: Tensor, t: float | Tensor) -> Tensor:
    """A table over (k/K, points), shape (K + 1, N), at (t, x); both are held inside the grid."""
    level = min(max(float(t), 0.0), 1.0) * (len(table) - 1)
    k = min(int(level), len(table) - 2)
    row = torch.lerp(table[k], table[k + 1], level - k)
    place = (x - points[0]) / (points[1] - points[0])
    i = place.long().clamp(0, len(points) - 2)
    return torch.lerp(row[i], row[i + 1], (place - i).clamp(0, 1))


def sliced_w2(samples: Tensor, law: GaussianMixture, directions: int = 32) -> float:
    """W2 between an empirical law (B, d) and a mixture, root mean square over projections; for d = 1 the plain W2.

    A projection of the mixture is a mixture on the line, whose quantiles are known: the exact side has no sampling noise.
    """
    dim = samples.shape[1]
    angles = torch.arange(directions, dtype=torch.float64) * math.pi / directions
    axes = torch.ones(1, 1, dtype=torch.float64) if dim == 1 else torch.stack([angles.cos(), angles.sin()], 1)
    if dim > 2:
        raise ValueError(f"sliced_w2 covers dimensions 1 and 2, but the samples have {dim}; project them first.")
    levels = (torch.arange(len(samples), dtype=torch.float64) + 0.5) / len(samples)
    squares = []
    for axis in axes:
        means, variances = law.means @ axis, torch.einsum("i,nij,j->n", axis, law.covariances, axis)
        quantiles = _quantiles(law.weights, means, variances.sqrt(), levels)
        squares.append((torch.sort(samples.double() @ axis).values - quantiles).square().mean())
    return float(torch.stack(squares).mean().sqrt())


def _quantiles(weights: Tensor, means: Tensor, stds: Tensor, levels: Tensor) -> Tensor:
    """Quantiles of a mixture on the line, by inverting its distribution function on a grid of 20 001 points."""
    low, high = float((means - 8 * stds).min()), float((means + 8 * stds).max())
    points = torch.linspace(low, high, 20_001, dtype=torch.float64)
    below = (weights * torch.special.ndtr((points[:, None] - means) / stds)).sum(1)
    return torch.from_numpy(np.interp(levels.numpy(), below.numpy(), points.numpy()))
