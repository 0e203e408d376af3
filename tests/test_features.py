"""Perceptual features against the distances that they stand for; small stand-ins for packages that the tests do without."""

import inspect
import sys
from collections import namedtuple
from functools import partial
from types import ModuleType

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from diffusers_adjoint.metrics import LPIPS, DreamSim
from diffusers_adjoint.rewards import differentiable_preprocess

SIZE = 32


class TinyLPIPS(nn.Module):
    """The parts of lpips.LPIPS that are used, and the distance by its definition, position by position."""

    def __init__(self, net, verbose):
        super().__init__()
        torch.manual_seed(0)
        self.scaling_layer = nn.BatchNorm2d(3)
        self.scaling_layer.running_mean.copy_(torch.tensor([0.1, -0.2, 0.3]))
        self.layers = nn.ModuleList([nn.Conv2d(3, 4, 5, stride=4), nn.Conv2d(4, 6, 3)])
        self.lins = nn.ModuleList([nn.Module() for _ in self.layers])
        for lin, layer in zip(self.lins, self.layers, strict=True):
            lin.model = nn.Sequential(nn.Dropout(), nn.Conv2d(layer.out_channels, 1, 1, bias=False))
            lin.model[-1].weight.data.abs_()
            lin.model[-1].weight.data[0, 0] = 0.0  # as many of the published ones are
        self.eval().requires_grad_(False)

    def net(self, x):
        first = self.layers[0](x).relu()
        return namedtuple("Outputs", "first second")(first, self.layers[1](first).relu())

    def distance(self, x, y):
        total = 0.0
        for a, b, lin in zip(self.net(self.scaling_layer(x)), self.net(self.scaling_layer(y)), self.lins, strict=True):
            weights, (height, width) = lin.model[-1].weight.flatten(), a.shape[-2:]
            for i in range(height):
                for j in range(width):
                    u, v = (F.normalize(h[0, :, i, j], dim=0) for h in (a, b))
                    total += (weights * (u - v).square()).sum().item() / (height * width)
        return total


class TinyDreamSim:
    """A model whose embeddings have no norm of 1, and which keeps what it was given."""

    calls: list[dict] = []

    def embed(self, pixels):
        self.pixels = pixels
        return F.adaptive_avg_pool2d(pixels, 4).flatten(1) - 0.4

    @classmethod
    def create(cls, **arguments):
        torch.hub.set_dir(arguments["cache_dir"])  # as the package does
        cls.calls.append(arguments)
        return cls(), None


@pytest.fixture
def packages(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    for name, attribute, value in (("lpips", "LPIPS", TinyLPIPS), ("dreamsim", "dreamsim", TinyDreamSim.create)):
        module = ModuleType(name)
        setattr(module, attribute, value)
        monkeypatch.setitem(sys.modules, name, module)


def squared_distance(features):
    return (features[0] - features[1]).double().square().sum().item()


def test_squared_distance_of_lpips_features_is_the_distance(packages):
    lpips, images = LPIPS(size=SIZE), torch.rand(2, 3, SIZE, SIZE)
    features = lpips(images)
    expected = lpips.model.distance(2 * images[:1] - 1, 2 * images[1:] - 1)
    assert features.shape == (2, 4 * 7 * 7 + 6 * 5 * 5)
    assert squared_distance(features) == pytest.approx(expected, rel=1e-4) and expected > 0.01  # differences of float32 features


@pytest.mark.parametrize("shape", [(48, 48), (20, 41)])
def test_lpips_stretches_the_image(packages, shape):
    lpips, images = LPIPS(size=SIZE), torch.rand(2, 3, *shape)
    stretched = F.interpolate(images, (SIZE, SIZE), mode="bicubic", antialias=True).clamp(0, 1)
    features = lpips(images)
    apart = torch.stack([features[0], lpips(stretched)[0]])
    # A hundredth of the distance of two images: here the overshoot of rows and columns is not cut one after the other.
    assert squared_distance(apart) < 0.01 * squared_distance(features)


def test_dreamsim_features_have_norm_one(packages):
    dreamsim, images = DreamSim(), torch.rand(3, 3, 224, 224)
    features = dreamsim(images)
    embeddings = dreamsim.model.embed(images)
    cosine = F.cosine_similarity(embeddings[0], embeddings[1], dim=0).item()
    assert squared_distance(features) == pytest.approx(2 * (1 - cosine), rel=1e-4)  # cancellation in 1 − cos, float32
    torch.testing.assert_close(features.norm(dim=1), torch.ones(3))


def test_dreamsim_sees_the_whole_image_in_its_colours(packages):
    dreamsim, images = DreamSim(), torch.rand(2, 3, 100, 300)
    dreamsim(images)
    expected = differentiable_preprocess(images, 224, (0.0,) * 3, (1.0,) * 3, resize=(224, 224))
    torch.testing.assert_close(dreamsim.model.pixels, expected)
    assert dreamsim.model.pixels.min() >= 0 and dreamsim.model.pixels.max() <= 1


def test_dreamsim_keeps_its_weights_in_the_hub_cache(packages, tmp_path):
    DreamSim(device=torch.device("cpu"))
    cache = tmp_path / "hub" / "dreamsim"
    assert TinyDreamSim.calls.pop() == {"pretrained": True, "device": "cpu", "cache_dir": str(cache)}
    assert cache.is_dir()  # the package would look into the working directory, and makes one level only
    assert torch.hub.get_dir() == str(tmp_path / "hub")


@pytest.mark.parametrize("make", [DreamSim, partial(LPIPS, size=SIZE)], ids=["dreamsim", "lpips"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_features_are_float32_without_gradient_whatever_the_batch(packages, make, dtype):
    features, images = make(), torch.rand(3, 3, 40, 40).to(dtype).requires_grad_()
    values = features(images)
    assert values.dtype == torch.float32 and not values.requires_grad
    # Other batch sizes may sum in another order; float32.
    torch.testing.assert_close(torch.cat([features(images[i : i + 1]) for i in range(3)]), values, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(features(images.float()), values, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("make", [DreamSim, LPIPS])
def test_features_need_images(packages, make):
    with pytest.raises(ValueError, match="reach from 0 to 255"):
        make()(torch.tensor([0.0, 255.0]).expand(1, 3, 64, 2))


@pytest.mark.parametrize("make, name", [(DreamSim, "dreamsim"), (LPIPS, "lpips")])
def test_missing_packages_are_named(monkeypatch, make, name):
    monkeypatch.setitem(sys.modules, name, None)  # how Python notes a module that cannot be imported
    with pytest.raises(ImportError, match=rf'the package {name} .* pip install "diffusers-adjoint\[metrics\]"\.$'):
        make()


def test_unknown_network_of_lpips():
    with pytest.raises(ValueError, match="net is 'resnet'"):
        LPIPS("resnet")


@pytest.mark.parametrize("net", ["alex", "squeeze"])
@pytest.mark.parametrize("size", [64, 80])
def test_lpips_is_that_of_the_package(monkeypatch, net, size):
    """The published weights of the channels come with the package; the network below them is random here."""
    package = pytest.importorskip("lpips")
    torch.manual_seed(0)
    monkeypatch.setattr(package, "LPIPS", partial(package.LPIPS, pnet_rand=True))
    lpips, images = LPIPS(net, size=size), torch.rand(2, 3, size, size)
    with torch.no_grad():
        expected = lpips.model(images[:1], images[1:], normalize=True).item()
    assert squared_distance(lpips(images)) == pytest.approx(expected, rel=1e-4)  # float32 sums


def test_dreamsim_is_called_as_the_package_expects():
    package = pytest.importorskip("dreamsim")
    inspect.signature(package.dreamsim).bind(pretrained=True, device="cpu", cache_dir="folder")
    assert callable(package.PerceptualModel.embed)
    assert sys.modules["dreamsim.model"].dreamsim_args["img_size"] == 224
