"""Statistics of the pixels: against plain formulas, the host libraries and real JPEG files."""

import colorsys
import io

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.fft import dctn
from scipy.ndimage import convolve
from scipy.stats import spearmanr
from sklearn.datasets import load_digits
from torch.autograd import gradcheck
from torch.nn import functional as F

from diffusers_adjoint.rewards import WeightedReward, reward_gradient
from diffusers_adjoint.rewards.image_statistics import (
    CHROMA_STEPS,
    LUMA_STEPS,
    _steps,
    brightness,
    colourfulness,
    compressibility,
    contrast,
    saturation,
    sharpness,
)

STATISTICS = [brightness, contrast, saturation, colourfulness, sharpness, compressibility]
LUMA = np.array([0.299, 0.587, 0.114])


def pixels(image):
    """(H·W, 3), float64."""
    return image.permute(1, 2, 0).reshape(-1, 3).double().numpy()


def plain_contrast(image):
    return np.std(pixels(image) @ LUMA)


def plain_saturation(image):
    return np.mean([colorsys.rgb_to_hsv(*pixel)[1] for pixel in pixels(image)])


def plain_colourfulness(image):
    """The paper's formula in its own 0–255 units."""
    red, green, blue = 255 * pixels(image).T
    rg, yb = red - green, (red + green) / 2 - blue
    return (np.sqrt(rg.var() + yb.var()) + 0.3 * np.sqrt(rg.mean() ** 2 + yb.mean() ** 2)) / 255


def plain_sharpness(image):
    luma = np.tensordot(LUMA, image.double().numpy(), 1)
    return convolve(luma, np.array([[0, 1, 0], [1, -4, 1], [0, 1, 0]]))[1:-1, 1:-1].var()


def plain_compressibility(image):
    """Block by block in PIL's YCbCr planes and tables and scipy's DCT; for sizes of whole blocks."""
    file = io.BytesIO()
    picture = Image.fromarray((255 * image).round().byte().permute(1, 2, 0).numpy())
    picture.save(file, "JPEG", quality=95)
    tables = Image.open(file).quantization
    y, cb, cr = (plane.astype(float) - 128 for plane in np.moveaxis(np.asarray(picture.convert("YCbCr")), 2, 0))
    halved = [(c[::2, ::2] + c[1::2, ::2] + c[::2, 1::2] + c[1::2, 1::2]) / 4 for c in (cb, cr)]
    bits = 0.0
    for plane, table, block_bits in ((y, tables[0], 6), (halved[0], tables[1], 4), (halved[1], tables[1], 4)):
        steps, before = np.reshape(table, (8, 8)), 0.0
        for top in range(0, plane.shape[0], 8):
            for left in range(0, plane.shape[1], 8):
                coefficients = dctn(plane[top : top + 8, left : left + 8], norm="ortho") / steps
                coefficients[0, 0], before = coefficients[0, 0] - before, coefficients[0, 0]
                bits += block_bits + 1.08 * np.log2(1 + 4 * coefficients**2).sum()
    return -bits / y.size


@pytest.mark.parametrize(
    "statistic, plain",
    [
        (brightness, lambda image: pixels(image).mean()),
        (contrast, plain_contrast),
        (saturation, plain_saturation),
        (colourfulness, plain_colourfulness),
        (sharpness, plain_sharpness),
    ],
)
def test_formula(statistic, plain):
    images = torch.rand(3, 3, 9, 14)
    images[0] *= 0.1
    expected = torch.tensor([plain(image) for image in images])
    torch.testing.assert_close(statistic(images), expected.float())
    torch.testing.assert_close(statistic(images.double()), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", ["noise", "bands"])
def test_compressibility_is_jpegs_transform(kind):
    """PIL rounds YCbCr to whole levels, steps at quality 95 are 1 to 12 levels: over many coefficients that averages out.

    Bands of one colour are means of blocks only, which cost by the order in which blocks follow each other.
    """
    if kind == "bands":
        images = torch.rand(2, 3, 2, 1).repeat_interleave(16, 2).expand(2, 3, 32, 48)
    else:
        smooth = F.interpolate(torch.rand(2, 3, 5, 7), (32, 48), mode="bicubic").clamp(0, 1)
        images = 0.9 * smooth + 0.1 * torch.rand(2, 3, 32, 48)
    images = images.mul(255).round() / 255
    expected = torch.tensor([plain_compressibility(image) for image in images]).float()
    torch.testing.assert_close(compressibility(images), expected, rtol=0.01, atol=0)


def test_quantisation_steps_are_libjpegs():
    for quality in range(1, 101):
        file = io.BytesIO()
        Image.new("RGB", (8, 8)).save(file, "JPEG", quality=quality)
        tables = Image.open(file).quantization
        for table, steps in zip((LUMA_STEPS, CHROMA_STEPS), (tables[0], tables[1]), strict=True):
            assert _steps(table, quality).flatten().tolist() == list(steps)


def scan_bits(image, quality):
    """Bits a pixel that libjpeg spends on the picture itself: what follows the "start of scan" header, less the end marker."""
    file = io.BytesIO()
    Image.fromarray((255 * image).round().byte().permute(1, 2, 0).numpy()).save(file, "JPEG", quality=quality)
    data = file.getvalue()
    start = data.index(b"\xff\xda") + 2
    header = int.from_bytes(data[start : start + 2], "big")
    return 8 * (len(data) - start - header - 2) / image[0].numel()


def blurred(noise, width):
    """Gaussian blur as a product in frequencies, brought back to variance 1."""
    rows, columns = torch.fft.fftfreq(noise.shape[-2])[:, None], torch.fft.rfftfreq(noise.shape[-1])
    kernel = torch.exp(-2 * (torch.pi * width) ** 2 * (rows**2 + columns**2))
    smooth = torch.fft.irfft2(torch.fft.rfft2(noise) * kernel, s=noise.shape[-2:])
    return smooth / smooth.std()


def varied_pictures(side):
    """Digits with hard and soft edges, noise from white to smooth and from faint to strong, gradients; grey and coloured."""
    digits = torch.from_numpy(load_digits().images[:8] / 16).float()[:, None]
    edges = [F.interpolate(digits, (side, side), mode=mode).clamp(0, 1) for mode in ("nearest", "bicubic")]
    tinted = [e * torch.rand(8, 3, 1, 1) + (1 - e) * torch.rand(8, 3, 1, 1) for e in edges]
    noise = [
        (0.5 + strength * blurred(torch.randn(1, colours, side, side), width)).clamp(0, 1).expand(1, 3, side, side)
        for strength in (0.01, 0.03, 0.1, 0.3)
        for width in (0, 1, 2, 4, 8)
        for colours in (1, 3)
    ]
    ramp = torch.linspace(0, 1, side)
    gradients = torch.rand(8, 3, 1, 1) * ramp / 2 + torch.rand(8, 3, 1, 1) * ramp[:, None] / 2
    pictures = [*(e.expand(-1, 3, -1, -1) for e in edges), *tinted, *noise, gradients]
    return torch.cat(pictures).mul(255).round() / 255


@pytest.mark.parametrize("quality", [50, 75, 95])
@pytest.mark.parametrize("side", [64, 100])
def test_compressibility_estimates_the_size_of_jpeg_files(side, quality):
    """Three in four within a fifth, all within a half, no bias, and ranks as the files' sizes rank: what its docstring says."""
    images = varied_pictures(side)
    real = torch.tensor([scan_bits(image, quality) for image in images])
    estimate = -compressibility(images, jpeg_quality=quality)
    ratio = estimate / real
    assert real.max() > 10 * real.min()  # a set that a wrong formula could not rank by luck
    assert spearmanr(estimate, real)[0] > 0.96
    assert ratio.min() > 0.5 and ratio.max() < 1.5 and abs(ratio.log().median()) < 0.1
    assert ((ratio - 1).abs() < 0.2).float().mean() > 0.75


def test_an_image_of_one_colour_costs_its_empty_blocks():
    """At 8 × 8 blocks of a mean of exactly 128 levels, four of luma and two of chroma for 256 pixels."""
    grey = torch.full((1, 3, 32, 32), 128 / 255, dtype=torch.float64)
    assert compressibility(grey).item() == pytest.approx(-(4 * 6 + 2 * 4) / 256, rel=1e-6)


def test_compressibility_repeats_edges_up_to_whole_blocks():
    images = torch.rand(1, 3, 20, 33)
    padded = np.pad(images[0].numpy(), ((0, 0), (0, 12), (0, 15)), mode="edge")
    expected = compressibility(torch.from_numpy(padded)[None]) * (32 * 48) / (20 * 33)
    torch.testing.assert_close(compressibility(images), expected)


@pytest.mark.parametrize("statistic", STATISTICS)
def test_gradient(statistic):
    """Random colours are far from the kinks of max and min, which only saturation has."""
    images = torch.rand(2, 3, 5, 6, dtype=torch.float64, requires_grad=True)
    assert gradcheck(statistic, images)


@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize("colour", [(0, 0, 0), (1, 1, 1), (0.3, 0.3, 0.3), (1, 0, 0), (0, 1, 1), (1e-30, 0, 0)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_finite_where_roots_and_quotients_are_not(statistic, colour, dtype):
    images = torch.tensor(colour, dtype=dtype).view(1, 3, 1, 1).expand(2, 3, 12, 12).clone().requires_grad_()
    values = statistic(images)
    (gradient,) = torch.autograd.grad(values.sum(), images)
    assert values.isfinite().all() and gradient.isfinite().all()


@pytest.mark.parametrize("statistic", [contrast, colourfulness, sharpness])
def test_zero_on_grey(statistic):
    """float32 rounds the luma of a grey pixel, by 1e-7."""
    assert statistic(torch.full((1, 3, 8, 8), 0.3)).abs().item() < 1e-6


def test_largest_values():
    """A chessboard of black and white has all the contrast there is, and sharpness 16; red pixels have saturation 1."""
    board = ((torch.arange(8)[:, None] + torch.arange(8)) % 2).double().expand(1, 3, 8, 8)
    assert contrast(board).item() == pytest.approx(0.5) and sharpness(board).item() == pytest.approx(16)
    assert saturation(torch.tensor([0.5, 0, 0]).view(1, 3, 1, 1)).item() == 1


@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_nothing_more(statistic, dtype):
    images = torch.rand(2, 3, 16, 17).to(dtype)
    assert statistic(images).dtype == torch.float32
    assert torch.equal(statistic(images), statistic(images.float()))


@pytest.mark.parametrize("statistic", STATISTICS)
def test_a_value_does_not_depend_on_its_batch(statistic):
    images = torch.rand(3, 3, 16, 20)
    alone = torch.cat([statistic(image[None]) for image in images])
    torch.testing.assert_close(statistic(images), alone)


def test_as_rewards_of_the_trainer():
    reward = WeightedReward(STATISTICS)
    reward.require_arguments({"caption": ["x"]})
    result = reward_gradient(torch.rand(2, 3, 16, 16), lambda x: x, reward, ["", ""], {"caption": ["x", "y"]})
    assert list(result.values) == [statistic.__name__ for statistic in STATISTICS]
    assert (result.gradient.flatten(1).norm(dim=1) > 0).all()


@pytest.mark.parametrize("statistic", STATISTICS)
def test_bad_images(statistic):
    with pytest.raises(ValueError, match=r"^images has shape \(1, 4, 8, 8\); pass .*\.$"):
        statistic(torch.rand(1, 4, 8, 8))
    with pytest.raises(ValueError, match=r"^images reach from -1 to .*\.$"):
        statistic(torch.full((1, 3, 8, 8), -1.0))


@pytest.mark.parametrize("quality", [0, 101, 75.5, "95", [95]])
def test_bad_quality(quality):
    with pytest.raises(ValueError, match=r"^jpeg_quality=.* is not a JPEG quality; pass an integer from 1 to 100\.$"):
        compressibility(torch.rand(1, 3, 8, 8), jpeg_quality=quality)


@pytest.mark.parametrize("height, width", [(2, 5), (5, 2)])
def test_too_small_to_be_sharp(height, width):
    with pytest.raises(ValueError, match=f"^images of {height} × {width} pixels have no Laplacian; pass 3 × 3 or more\\.$"):
        sharpness(torch.rand(1, 3, height, width))
