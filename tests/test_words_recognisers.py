"""The recognisers of the words example: an ONNX graph in torch, what it reads, and its gradient."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import Tensor

sys.path.append(str(Path(__file__).parents[1] / "examples" / "words"))

import recognisers  # noqa: E402
from judges import font_accuracy, has_tesseract, judge_images, read_by_tesseract  # noqa: E402
from onnx_network import OnnxNetwork  # noqa: E402
from recognisers import Recogniser, character_errors, recogniser  # noqa: E402
from spelling import judge, spelling  # noqa: E402
from word_pictures import FONTS, TUNED_WORDS, misspell, prompt, render, render_at_random, word_of  # noqa: E402

BOTH = pytest.mark.parametrize("name", ["v4", "v6"])


def picture(word: str, font: str = "DejaVuSans", **options: float) -> Tensor:
    """(1, 3, 16, 48) in [0, 1]."""
    return render(word, font, 11.0, **options)[None, None].expand(1, 3, -1, -1)


@BOTH
def test_graph_gives_what_the_reference_of_onnx_gives(name: str) -> None:
    # Set 15 of the operators: the reference evaluates set 11's BatchNormalization as in training.
    model = onnx.version_converter.convert_version(onnx.load(recognisers.weights_file(name)), 15)
    x = torch.rand(1, 3, 48, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1
    (expected,) = ReferenceEvaluator(model).run(None, {model.graph.input[0].name: x.numpy()})
    found = recogniser(name).network(x).softmax(-1)
    # Float32 through 50 convolutions; measured 3e-6.
    torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=3e-5)


@BOTH
def test_reads_drawn_words_in_every_font(name: str) -> None:
    rng, reader = random.Random(0), recogniser(name)
    words = [rng.choice(TUNED_WORDS) for _ in FONTS for _ in range(4)]
    images = torch.stack([render(w, font, 11.0 * FONTS[font]) for w, font in zip(words, [*FONTS] * 4, strict=True)])
    read = reader.read(reader(images[:, None].expand(-1, 3, -1, -1)))
    # At most one of 32 wrong: 464 pictures had 4 misreadings by v4 and none by v6.
    assert sum(a != b for a, b in zip(read, words, strict=True)) <= 1


@BOTH
def test_log_probability_of_the_word_falls_with_one_wrong_letter(name: str) -> None:
    rng, reader = random.Random(0), recogniser(name)
    words = list(TUNED_WORDS[:8])
    images = torch.stack([render_at_random(word, rng) for word in words])[:, None].expand(-1, 3, -1, -1)
    seen = reader(images)
    right, wrong = (reader.word_log_prob(seen, asked) for asked in (words, [misspell(word, rng) for word in words]))
    assert (right > -1).all() and (wrong < -3).all()


def test_log_probability_is_the_sum_over_alignments() -> None:
    """Against all paths of a tiny table, written out: CTC of Graves et al. 2006, eq. 3."""
    reader = object.__new__(Recogniser)
    reader.name, reader.alphabet = "tiny", ["", "a", "b", " "]
    seen = torch.randn(1, 4, 3, dtype=torch.float64).log_softmax(-1)
    expected = torch.tensor(0.0, dtype=torch.float64)
    for path in torch.cartesian_prod(*[torch.arange(3)] * 4):
        letters = [reader.alphabet[i] for i in torch.unique_consecutive(path).tolist() if i]
        if "".join(letters) == "ab":
            expected += seen[0, range(4), path].sum().exp()
    torch.testing.assert_close(reader.word_log_prob(seen, ["ab"])[0], expected.log())


@BOTH
def test_white_margins_are_worth_little(name: str) -> None:
    """A space counts as blank. Else a wider margin would add the log-probability of a space that nobody asked for."""
    reader = recogniser(name)
    narrow, wide = picture("house"), picture("house")[..., 4:44]
    wide = torch.nn.functional.pad(wide, (8, 8, 0, 0), value=1.0)
    seen = [reader(x) for x in (narrow, wide)]
    assert min(reader.word_log_prob(x, ["house"]).item() for x in seen) > -0.5
    # Without the space the sums fell to .48 (v4) and .9997 (v6). Float32: 6000 terms, measured 5e-6.
    for x in seen:
        torch.testing.assert_close(x.exp().sum(-1), torch.ones(x.shape[:2]), rtol=0, atol=3e-5)


def test_gradient_agrees_with_finite_differences() -> None:
    reader = Recogniser("v4")
    constants = reader.network.constants
    reader.network.constants = {k: v.double() if v.is_floating_point() else v for k, v in constants.items()}
    image = (0.1 + 0.8 * picture("horse").double()).requires_grad_()  # away from where pixels are clamped
    direction = torch.randn(image.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def value(x: Tensor) -> Tensor:
        return reader.word_log_prob(reader(x), ["house"])[0]  # not the word in the picture: the slope is steep

    (gradient,) = torch.autograd.grad(value(image), image)
    step = 1e-7
    with torch.no_grad():
        slope = (value(image + step * direction) - value(image - step * direction)) / (2 * step)
    # Float64: the error is step² and rounding, below 1e-7 of the slope. With a step of 1e-6 a ReLU lay within it at times.
    torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-5, atol=0)


def test_a_climb_on_the_pixels_fools_the_reward_and_not_the_judge() -> None:
    """What the gap between v4 and v6 is a meter of."""
    asked = [prompt("seven")]
    logits = (0.1 * torch.randn(1, 3, 16, 48, generator=torch.Generator().manual_seed(0))).requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.1)
    for _ in range(60):
        optimizer.zero_grad()
        (-spelling(logits.sigmoid(), asked)).sum().backward()
        optimizer.step()
    fooled, unmoved = spelling(logits.sigmoid(), asked).item(), judge(logits.sigmoid(), asked).item()
    assert fooled > -1 and unmoved < fooled - 5


@pytest.mark.slow
def test_judgement_of_drawn_words() -> None:
    words = ["house", "seven"]
    images = torch.cat([picture("house"), picture("seven", "DejaVuSerif-Bold")])
    judged = judge_images(images, words)
    assert judged.read_v4 == judged.read_v6 == words
    assert [list(FONTS)[i] for i in judged.font] == ["DejaVuSans", "DejaVuSerif-Bold"]
    torch.testing.assert_close(judged.ink, 1 - images.mean((1, 2, 3)))
    torch.testing.assert_close(judged.log_prob_v6, judge(images, list(map(prompt, words))))


@pytest.mark.slow
def test_fonts_are_told_apart_in_words_that_were_never_seen() -> None:
    assert font_accuracy(400) >= 0.97  # measured .995


@pytest.mark.skipif(not has_tesseract(), reason="the program tesseract is not installed")
def test_tesseract_reads_a_drawn_word() -> None:
    assert read_by_tesseract(picture("bread", "DejaVuSerif")[0]) == "bread"


@pytest.mark.parametrize(
    ("read", "word", "errors"),
    [("house", "house", 0), ("horse", "house", 1), ("", "six", 3), ("hose", "house", 1), ("abc", "", 3)],
)
def test_character_errors(read: str, word: str, errors: int) -> None:
    assert character_errors(read, word) == character_errors(word, read) == errors


def test_words_and_prompts() -> None:
    assert word_of(prompt("seven")) == "seven"
    for wrong in ("seven", 'the word "seven', 'a word "seven"', 'the word "7"', 'the word ""'):
        with pytest.raises(ValueError, match="names no word; write it as"):
            word_of(wrong)


def test_a_letter_that_the_recogniser_lacks_is_named() -> None:
    with pytest.raises(ValueError, match="v4 knows no 'ß'; write words without"):
        spelling(picture("house"), ['the word "straße"'])


def test_a_word_with_too_many_letters_for_the_places_is_named() -> None:
    """12 places, and a doubled letter needs a blank in between: 12 letters fit, 11 with two doubles do not."""
    seen = recogniser("v4")(picture("house").expand(2, -1, -1, -1))
    assert recogniser("v4").word_log_prob(seen, ["house", "acknowledges"]).isfinite().all()
    with pytest.raises(ValueError, match="v4 sees 12 places, too few for 'bookkeepers', 'mississippi'; write shorter"):
        recogniser("v4").word_log_prob(seen, ["mississippi", "bookkeepers"])


def test_a_missing_wheel_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recognisers, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"package rapidocr, which is not installed; run `pip install -e '.\[words\]'`"):
        Recogniser("v6")


HARD_SWISH = [
    ("Add", ["x", "three"], "a"),
    ("Clip", ["a", "zero", "six"], "c"),
    ("Mul", ["x", "c"], "m"),
    ("Div", ["m", "six"], "y"),
]


def network_of(nodes: list[tuple[str, list[str], str]], folder: Path, **constants: list[float]) -> OnnxNetwork:
    """x of four numbers → y, then a softmax, which the network leaves out."""
    x, z = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [4]) for name in "xz")
    values = {"zero": [0.0], "three": [3.0], "six": [6.0]} | constants
    kept = [onnx.numpy_helper.from_array(torch.tensor(v).squeeze().numpy(), name) for name, v in values.items()]
    made = [onnx.helper.make_node(name, inputs, [output]) for name, inputs, output in [*nodes, ("Softmax", ["y"], "z")]]
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph(made, "g", [x], [z], kept)), folder / "graph.onnx")
    return OnnxNetwork(folder / "graph.onnx")


def test_four_operations_are_one_hard_swish_and_no_others(tmp_path: Path) -> None:
    """Left alone: another divisor, a number that is a vector, an inner value that is used again, an input that is another's."""
    x = torch.tensor([-4.0, -1.0, 2.0, 5.0])
    network = network_of(HARD_SWISH, tmp_path)
    assert [name for name, *_ in network.nodes] == ["HardSwish"]
    torch.testing.assert_close(network(x), x * (x + 3).clamp(0, 6) / 6)

    assert [name for name, *_ in network_of([*HARD_SWISH[:3], ("Div", ["m", "three"], "y")], tmp_path).nodes][-1] == "Div"
    vector = network_of(HARD_SWISH, tmp_path, three=[3.0, 3.0, 3.0, 1.0])
    torch.testing.assert_close(vector(x)[3], torch.tensor(5.0))
    again = network_of([*HARD_SWISH[:3], ("Div", ["m", "six"], "d"), ("Add", ["d", "c"], "y")], tmp_path)
    torch.testing.assert_close(again(x), x * (x + 3).clamp(0, 6) / 6 + (x + 3).clamp(0, 6))
    other = network_of([*HARD_SWISH[:2], ("Mul", ["three", "c"], "m"), HARD_SWISH[3]], tmp_path)
    torch.testing.assert_close(other(x), 3 * (x + 3).clamp(0, 6) / 6)


def test_an_unknown_operation_is_named(tmp_path: Path) -> None:
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    node = onnx.helper.make_node("Tanh", ["x"], ["y"])
    model = onnx.helper.make_model(onnx.helper.make_graph([node], "g", [value], [value]))
    onnx.save(model, tmp_path / "tanh.onnx")
    with pytest.raises(ValueError, match=r"uses \['Tanh'\], which onnx_network.py does not know"):
        OnnxNetwork(tmp_path / "tanh.onnx")
