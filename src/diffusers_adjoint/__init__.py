"""Adjoint Matching for diffusers: fine-tune a pipeline until it samples p_base(x)·exp(r(x))."""

__version__ = "0.1.0.dev0"
