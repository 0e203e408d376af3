"""Adjoints from the noiseless end point of a path, as every reward fine-tuning has them."""

from diffusers_adjoint.core.adjoint import end_point, full_adjoint, lean_adjoint


def lean_from_end(base_mean, path, terminal, lowest=0, **options):
    """`lean_adjoint` from `terminal`, x̂_K → ã_K."""
    end = end_point(path, base_mean)
    return lean_adjoint(base_mean, path, terminal(end.state), lowest, end=end, **options)


def full_from_end(mean, base_mean, path, terminal, lowest=0, **options):
    """`full_adjoint` from `terminal`, x̂_K → a_K."""
    end = end_point(path, base_mean, mean)
    return full_adjoint(mean, base_mean, path, terminal(end.state), lowest, end=end, **options)
