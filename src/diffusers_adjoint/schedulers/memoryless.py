r"""Shared parts of the memoryless schedulers: the coefficients of a grid's steps, and the step itself.

Every scheduler is transformed to flow coordinates (see `integrators`) and back. With x = α X_1 + β X_0, t = α/(α + β), and a
network whose output m gives the velocity v = p x + q m, step k from (α, β) to (α', β') is

    x' = (α' + β') [ state · x/(α + β) + velocity · (p x + q m) + std · ξ ]  =  A_k x + C_k m + s_k ξ

| prediction type | m | p | q |
|---|---|---|---|
| flow_prediction | X_0 − X_1 (α + β = 1) | 0 | −1 |
| velocity | X_1 − X_0 (α + β = 1) | 0 | 1 |
| epsilon | X_0 | 1/α | −(α + β)/α |
| sample | X_1 | −1/β | (α + β)/β |
| v_prediction | α X_0 − β X_1 (α² + β² = 1) | α − β | −(α + β) |
"""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass, fields
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ..core.transition import Transition
from .integrators import DEFAULT_INTEGRATOR, INTEGRATORS

__all__ = ["MemorylessStep", "TransitionTable", "check_integrator", "require_unused", "transition_table"]


@dataclass(frozen=True)
class TransitionTable:
    """Coefficients of all steps of a grid; tensors (K,), float64, CPU. Entry k belongs to step k, which starts at x_k.

    x_{k+1} = state · x + output · m + std · ξ, x̂_1 = clean_state · x + clean_output · m, and x = alpha · X_1 + beta · X_0.
    `posterior_std` is the std of the integrator "posterior" on the same grid.
    """

    state: Tensor
    output: Tensor
    std: Tensor
    posterior_std: Tensor
    clean_state: Tensor
    clean_output: Tensor
    alpha: Tensor
    beta: Tensor


def check_integrator(name: str, argument: str = "integrator") -> None:
    """Raise ValueError if there is no such integrator; `argument` is the name of the argument, for the message."""
    if name not in INTEGRATORS:
        raise ValueError(f"{argument}={name!r} is unknown; pass one of {', '.join(map(repr, INTEGRATORS))}.")


def _velocity_coefficients(prediction_type: str, alpha: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """(p, q) of v = p x + q m, each (K,)."""
    zero, one = torch.zeros_like(alpha), torch.ones_like(alpha)
    coefficients = {
        "flow_prediction": (zero, -one),
        "velocity": (zero, one),
        "epsilon": (1 / alpha, -(alpha + beta) / alpha),
        "sample": (-1 / beta, (alpha + beta) / beta),
        "v_prediction": (alpha - beta, -(alpha + beta)),
    }
    return coefficients[prediction_type]


def transition_table(alphas: Tensor, betas: Tensor, prediction_type: str, integrator: str) -> TransitionTable:
    """Coefficients of every step of a grid.

    Args:
        alphas: α_0 … α_K, the share of data, shape (K + 1,), float64, from noise to data.
        betas: β_0 … β_K, the share of noise, same shape.
        prediction_type: a row of the table above.
        integrator: a key of `INTEGRATORS`.

    Raises:
        ValueError: if the noise grows along the grid, or the prediction contains no information on the data (epsilon at α = 0).
    """
    if prediction_type == "epsilon" and (alphas[:-1] == 0).any():
        raise ValueError(
            "the grid starts at pure noise (zero terminal SNR), where prediction_type='epsilon' says nothing about the data; "
            "use a 'v_prediction' or 'sample' model, or a timestep_spacing that leaves the last timestep out."
        )
    times = alphas / (alphas + betas)
    t, h = times[:-1], times.diff()
    if (h < 0).any():
        step = int((h < 0).nonzero()[0])
        raise ValueError(f"the noise grows along the grid at step {step}; pass sigmas that never increase.")
    alpha, beta, scale = alphas[:-1], betas[:-1], alphas + betas
    p, q = _velocity_coefficients(prediction_type, alpha, beta)
    steps = INTEGRATORS[integrator](t, h)
    # A step of length 0 changes nothing; at t = 1 the formulas would give 0/0.
    state = torch.where(h > 0, steps.state, 1.0)
    velocity = torch.where(h > 0, steps.velocity, 0.0)
    std, posterior_std = (torch.where(h > 0, found.std, 0.0) for found in (steps, INTEGRATORS["posterior"](t, h)))
    return TransitionTable(
        state=scale[1:] * (state / scale[:-1] + velocity * p),
        output=scale[1:] * velocity * q,
        std=scale[1:] * std,
        posterior_std=scale[1:] * posterior_std,
        clean_state=(1 + beta * p) / scale[:-1],
        clean_output=beta * q / scale[:-1],
        alpha=alpha,
        beta=beta,
    )


def require_unused(**used: bool) -> None:
    """Raise ValueError if arguments of the parent's `step` are used that would change the noise or the grid."""
    if names := [name for name, is_used in used.items() if is_used]:
        raise ValueError(
            f"{', '.join(names)} would choose another sampler's step; leave it out, because this one has its own noise and grid."
        )


class MemorylessStep:
    """Mixin of all memoryless schedulers: the transition as a pure function, and the noise for the stateful `step`."""

    timesteps: Tensor
    _table: TransitionTable | None = None
    _generator: torch.Generator | list[torch.Generator] | None = None
    _warned = False  # whether the warning of noise from the global generator was given

    def __deepcopy__(self, memo: dict[int, Any]) -> MemorylessStep:
        """With the noise source of the original: a pipeline that steps a second latent with a copy of its scheduler would give
        both the same noise if the copy repeated what the original draws."""
        twin = copy.copy(self)
        memo |= {id(self): twin, id(self._generator): self._generator}
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    def set_generator(self, generator: torch.Generator | list[torch.Generator] | None) -> None:
        """Set the noise source of `step` for pipelines that pass none, as many do. A generator given to `step` takes precedence.

        Args:
            generator: one generator, a list of one for each sample, or `None` for torch's global generator.
        """
        self._generator = generator

    @property
    def generator(self) -> torch.Generator | list[torch.Generator] | None:
        """What `set_generator` was given."""
        return self._generator

    @property
    def table(self) -> TransitionTable:
        """Coefficients of the current grid.

        Raises:
            ValueError: before `set_timesteps`.
        """
        if self._table is None:
            raise ValueError(f"{type(self).__name__} has no grid yet; call set_timesteps(num_inference_steps) first.")
        return self._table

    @property
    def stds(self) -> Tensor:
        """s_k of every step, shape (K,), float64, CPU; 0 where the step adds no noise."""
        return self.table.std

    @property
    def posterior_stds(self) -> Tensor:
        """s_k of the integrator "posterior" on the current grid, shape (K,), float64, CPU; 0 only at a step of length 0.

        With these stds, the path KL of "ancestral" and "posterior" is near the KL of the end points' distributions for data of
        about unit variance, and too small for narrower data (docs/theory.md).
        """
        return self.table.posterior_std

    @property
    def levels(self) -> Tensor:
        """α_k and β_k of x_k = α_k x_1 + β_k ξ, which step k starts from, shape (2, K), float64, CPU."""
        return torch.stack([self.table.alpha, self.table.beta])

    @property
    def times(self) -> Tensor:
        """t_k = α_k/(α_k + β_k), the share of data that step k starts from, shape (K,), float64, CPU."""
        return self.table.alpha / (self.table.alpha + self.table.beta)

    def transition(self, model_output: Tensor, sample: Tensor, index: int) -> Transition:
        """The distribution N(A_k x + C_k m, s_k² I) of the next state.

        A pure function, differentiable in both tensors; steps may be taken in any order.

        Args:
            model_output: m(x_k, t_k), the (guided) prediction that the pipeline passes to `step`, shape (B, …).
            sample: x_k, same shape.
            index: k, 0 … K − 1.

        Returns:
            Transition with the mean in the wider of float32 and the sample's dtype, and s_k as a float.

        Raises:
            ValueError: before `set_timesteps`, for an index off the grid, or if the shapes differ.
        """
        table = self.table
        self._check_step(index, model_output=model_output, sample=sample)
        mean = _combined(table.state[index], sample, table.output[index], model_output)
        return Transition(mean, float(table.std[index]))

    def noised(self, clean: Tensor, noise: Tensor, index: int) -> Tensor:
        """x_k = α_k x_1 + β_k ξ: clean data at the noise level that step k starts from.

        Args:
            clean: x_1, shape (B, …).
            noise: ξ, standard normal, same shape.
            index: k, 0 … K − 1.

        Raises:
            ValueError: before `set_timesteps`, for an index off the grid, or if the shapes differ.
        """
        self._check_step(index, clean=clean, noise=noise)
        return _combined(self.table.alpha[index], clean, self.table.beta[index], noise)

    def toward(self, clean: Tensor, sample: Tensor, index: int) -> Tensor:
        """The mean of step k from x_k if the clean prediction is x_1; affine in both.

        With the clean prediction x̂_1 of a network, `toward(x̂_1, x_k, k)` is the mean of `transition`.

        Args:
            clean: x_1, shape (B, …).
            sample: x_k, same shape.
            index: k, 0 … K − 1.

        Raises:
            ValueError: as `noised`.
        """
        self._check_step(index, clean=clean, sample=sample)
        of_sample, of_clean = self._toward(index)
        return _combined(of_sample, sample, of_clean, clean)

    def clean(self, mean: Tensor, sample: Tensor, index: int) -> Tensor:
        """The clean prediction x̂_1 with which step k from x_k has this mean: the inverse of `toward` in its first argument.

        Args:
            mean: μ_k(x_k), shape (B, …).
            sample: x_k, same shape.
            index: k, 0 … K − 1.

        Raises:
            ValueError: as `noised`, and for a step that starts without noise, whose mean does not depend on the prediction.
        """
        self._check_step(index, mean=mean, sample=sample)
        of_sample, of_clean = self._toward(index)
        if of_clean == 0:
            raise ValueError(f"step {index} does not move its state, whatever the prediction; pass an earlier step.")
        return _combined(-of_sample / of_clean, sample, 1 / of_clean, mean)

    def _toward(self, index: int) -> tuple[Tensor, Tensor]:
        """μ_k's coefficients of x_k and of x̂_1, from m = (x̂_1 − clean_state · x)/clean_output."""
        table = self.table
        # From a state without noise (β = 0) the step does nothing, whatever m is.
        pull = table.output[index] / table.clean_output[index] if table.beta[index] > 0 else torch.zeros_like(table.beta[index])
        return table.state[index] - pull * table.clean_state[index], pull

    def score(self, clean: Tensor, sample: Tensor, index: int) -> Tensor:
        """The score ∇ log p_k(x_k) = (α_k x̂_1 − x_k)/β_k² by Tweedie's formula, from the clean prediction x̂_1.

        Args:
            clean: x̂_1 at x_k, shape (B, …).
            sample: x_k, same shape.
            index: k, 0 … K − 1.

        Raises:
            ValueError: as `noised`, and for a step that starts without noise (β_k = 0).
        """
        self._check_step(index, clean=clean, sample=sample)
        alpha, beta = self.table.alpha[index], self.table.beta[index]
        if beta == 0:
            raise ValueError(f"step {index} starts without noise, where the data have no score; pass an earlier step.")
        return _combined(alpha / beta**2, clean, -1 / beta**2, sample)

    def ending_at(self, noise: float) -> MemorylessStep:
        """A copy whose last step starts at the noise share β/(α + β) = `noise`, or the nearest one that the model knows.

        It is for the score of almost clean data, at one level beside the grid. All other steps are those of this grid.

        Raises:
            ValueError: before `set_timesteps`, or for a share that is not between 0 and 1.
        """
        if not 0 < noise < 1:
            raise ValueError(f"noise={noise} is not a share of noise; pass a number between 0 and 1, such as 0.02.")
        table, ending = self.table, copy.copy(self)
        timestep, alpha, beta = self._end_at(ending, noise)
        ending.timesteps = torch.cat([self.timesteps[:-1], self.timesteps.new_tensor([timestep])])
        alphas, betas = torch.tensor([[alpha, 1.0], [beta, 0.0]], dtype=torch.float64)
        last = transition_table(alphas, betas, self._prediction_type, DEFAULT_INTEGRATOR)
        joined = {f.name: torch.cat([getattr(table, f.name)[:-1], getattr(last, f.name)]) for f in fields(table)}
        ending._table = TransitionTable(**joined)
        return ending

    @property
    def _prediction_type(self) -> str:
        """A row of the table of `transition_table`."""
        raise NotImplementedError

    def _end_at(self, ending: Any, noise: float) -> tuple[float, float, float]:
        """Timestep, α and β at this share of noise. Other attributes of the grid that contain the level are set in `ending`."""
        raise NotImplementedError

    @property
    def gains(self) -> Tensor:
        """g_k = ∂μ_k/∂score, shape (K,), float64, CPU: by how much the score at x_k changes the mean of step k.

        It follows from x̂_1 = (x + β² score)/α. It is infinite at pure noise (α_k = 0), whose score does not depend on the data.
        """
        pulls = torch.stack([self._toward(index)[1] for index in range(len(self.table.std))])
        return pulls * self.table.beta**2 / self.table.alpha

    def _check_step(self, index: int, **given: Tensor) -> None:
        if not 0 <= index < len(self.table.std):
            raise ValueError(f"index={index} is not on the grid; pass a step from 0 to {len(self.table.std) - 1}.")
        (name, tensor), (other, reference) = given.items()
        if tensor.shape != reference.shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)} but {other} {tuple(reference.shape)}; they must agree"
                + (", so split a learned variance off first." if name == "model_output" else ".")
            )

    def _index_of(self, timestep: float | Tensor) -> int:
        """k of a timestep of the grid, for schedulers whose timesteps are all different."""
        found = (self.timesteps == timestep).nonzero()
        if len(found) == 0:
            raise ValueError(f"timestep={float(timestep):g} is not on the grid; pass one of scheduler.timesteps.")
        return int(found[0])

    def _next_sample(
        self, model_output: Tensor, sample: Tensor, index: int, generator: torch.Generator | list[torch.Generator] | None
    ) -> Tensor:
        """Sample from the transition, in the sample's dtype. The last step returns its mean, the noiseless end point x̂_K."""
        step = self.transition(model_output, sample, index)
        if index == len(self.table.std) - 1:
            return step.mean.to(sample.dtype)
        generator = self._generator if generator is None else generator
        if generator is None and not self._warned:
            self._warned = True
            warnings.warn(
                f"{type(self).__name__} draws its noise from torch's global generator, because the pipeline passed none to step; "
                f"for reproducible images, call set_generator(generator) or torch.manual_seed.",
                stacklevel=3,
            )
        if isinstance(generator, list) and len(generator) != len(sample):
            raise ValueError(
                f"{len(generator)} generators do not fit a batch of {len(sample)}; pass one, or one for each sample."
            )
        noise = randn_tensor(step.mean.shape, generator=generator, device=sample.device, dtype=step.mean.dtype)
        return step.sample(noise).to(sample.dtype)

    def _predicted_data(self, model_output: Tensor, sample: Tensor, index: int) -> Tensor:
        """x̂_1, in the sample's dtype."""
        return _combined(self.table.clean_state[index], sample, self.table.clean_output[index], model_output).to(sample.dtype)


def _combined(a: Tensor, x: Tensor, b: Tensor, y: Tensor) -> Tensor:
    """a x + b y, in the wider of float32 and x's dtype; the coefficients are 0-dimensional, float64."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return float(a) * x.to(dtype) + float(b) * y.to(dtype)
