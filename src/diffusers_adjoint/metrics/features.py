"""Perceptual features for measuring diversity: images (B, 3, H, W) in [0, 1] → (B, D), without gradient.

`LPIPS` and `DreamSim` need packages that are not installed by default. CLIPScore, PickScore and other rewards have a method
`features(images)` of their own.
"""

from __future__ import annotations

from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..rewards import differentiable_preprocess

__all__ = ["LPIPS", "DreamSim", "pixels"]


def pixels(images: Tensor) -> Tensor:
    """Pixel values as features, (B, D), scaled so that ‖f_i − f_j‖² is the mean squared difference of two images' values."""
    return images.flatten(1) / images[0].numel() ** 0.5


class DreamSim:
    """Features of norm 1 whose squared distance is twice the DreamSim distance (2306.09344): ‖f_i − f_j‖² = 2(1 − cos).

    It is the published ensemble of three ViT-B/16, on the whole image stretched to 224 × 224 pixels (bicubic), as its authors do.
    On first use the package downloads the weights into the `dreamsim` folder of torch's hub cache, and the code of
    facebookresearch/dino, which it runs.

    Args:
        device: device of the models, such as "cuda"; they cannot be moved later.

    Raises:
        ImportError: if the package dreamsim is not installed.
    """

    def __init__(self, device: str | torch.device = "cpu") -> None:
        create, hub = _package("dreamsim").dreamsim, torch.hub.get_dir()
        cache = Path(hub) / "dreamsim"
        cache.mkdir(parents=True, exist_ok=True)  # the package creates the last folder only
        try:
            self.model, _ = create(pretrained=True, device=str(device), cache_dir=str(cache))
        finally:
            torch.hub.set_dir(hub)  # restored, because the package changes it
        self.device = device
        # The model normalises colours itself.
        self.preprocess = partial(differentiable_preprocess, size=224, resize=(224, 224), mean=(0.0,) * 3, std=(1.0,) * 3)

    def __call__(self, images: Tensor) -> Tensor:
        """Features, (B, D), float32, on `device`.

        Raises:
            ValueError: if the images have the wrong shape or range.
            TypeError: if they are not floating.
        """
        with torch.no_grad():
            pixels = self.preprocess(images.to(self.device)).float()
            # Normalised again, because older releases of the package subtract a mean after they normalise.
            return F.normalize(self.model.embed(pixels), dim=-1)


class LPIPS:
    """Features whose squared distance is the LPIPS distance (1801.03924, eq. 1): ‖f_i − f_j‖² = d(i, j).

    f concatenates √(w_l/(H_l W_l)) ⊙ ŷ_l over layers l, where ŷ_l has norm 1 over channels at each position, and w_l are the
    published weights of the channels, version 0.1.

    LPIPS depends on the number of pixels, so all images are stretched to one size (bicubic). At that size the distance is that of
    the package. An image of 256 × 256 pixels has 640,128 features with "alex" (2.6 MB), and 7,995,392 with "vgg", so measure one
    prompt at a time.

    Args:
        net: the network, "alex", "vgg" or "squeeze"; torchvision downloads its ImageNet weights on first use.
        size: height and width of the stretched image in pixels.
        device: device of the network, such as "cuda".

    Raises:
        ValueError: if `net` is another name.
        ImportError: if the package lpips is not installed.
    """

    def __init__(self, net: str = "alex", size: int = 256, device: str | torch.device = "cpu") -> None:
        if net not in ("alex", "vgg", "squeeze"):
            raise ValueError(f'net is {net!r}; pass "alex", "vgg" or "squeeze".')
        self.model = _package("lpips").LPIPS(net=net, verbose=False).to(device)
        self.device = device
        self.preprocess = partial(differentiable_preprocess, size=size, resize=(size, size), mean=(0.5,) * 3, std=(0.5,) * 3)

    def __call__(self, images: Tensor) -> Tensor:
        """Features, (B, D), float32, on `device`.

        Raises:
            ValueError: if the images have the wrong shape or range.
            TypeError: if they are not floating.
        """
        with torch.no_grad():
            pixels = self.preprocess(images.to(self.device)).float()
            layers = self.model.net(self.model.scaling_layer(pixels))
            weights = [linear.model[-1].weight for linear in self.model.lins]  # (1, C, 1, 1), none negative
            return torch.cat([_weighted(layer, w) for layer, w in zip(layers, weights, strict=True)], 1)


def _weighted(layer: Tensor, weights: Tensor) -> Tensor:
    """One layer's part of the features, (B, C, H, W) → (B, CHW)."""
    unit = layer / (layer.norm(dim=1, keepdim=True) + 1e-10)  # the package's ε
    positions = layer.shape[2] * layer.shape[3]
    return (unit * (weights / positions).sqrt()).flatten(1)


def _package(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise ImportError(
            f'the package {name} cannot be imported ({error}); run pip install "diffusers-adjoint[metrics]".', name=name
        ) from error
