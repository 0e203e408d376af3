"""An ONNX graph as a differentiable torch module: the operations of two text recognisers, no more.

onnxruntime has no gradient, and onnx2torch does not know all of these operations. Each operation below follows its page in the
ONNX specification, operator set 11 or 12.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import onnx
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from torch import Tensor, nn

Attributes = dict[str, Any]
Node = tuple[str, Attributes, list[str], str]  # operation, attributes, names of the inputs, name of the output
DTYPES = {1: torch.float32, 6: torch.int32, 7: torch.int64, 9: torch.bool, 11: torch.float64}


def _pad(x: Tensor, a: Attributes, kernel: Sequence[int], value: float = 0.0) -> Tensor:
    """Explicit padding, since torch's convolutions know none that differs between left and right."""
    top, left, bottom, right = a.get("pads", (0, 0, 0, 0))
    if a.get("auto_pad", b"NOTSET") == b"SAME_UPPER":
        strides = a.get("strides", (1, 1))
        sizes = zip(x.shape[2:], kernel, strides, strict=True)
        rows, columns = (max((-(-n // s) - 1) * s + k - n, 0) for n, k, s in sizes)
        top, left, bottom, right = rows // 2, columns // 2, rows - rows // 2, columns - columns // 2
    return F.pad(x, (left, right, top, bottom), value=value) if any((top, left, bottom, right)) else x


def _conv(a: Attributes, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    x = _pad(x, a, weight.shape[2:])
    return F.conv2d(x, weight, bias, a.get("strides", (1, 1)), 0, a.get("dilations", (1, 1)), a.get("group", 1))


def _average_pool(a: Attributes, x: Tensor) -> Tensor:
    if any(a.get("pads", (0,))) or a.get("ceil_mode", 0):
        raise NotImplementedError("AveragePool with padding or ceil_mode; add it to onnx_network.py.")
    return F.avg_pool2d(x, a["kernel_shape"], a["strides"])


def _max_pool(a: Attributes, x: Tensor) -> Tensor:
    if a.get("ceil_mode", 0):
        raise NotImplementedError("MaxPool with ceil_mode; add it to onnx_network.py.")
    return F.max_pool2d(_pad(x, a, a["kernel_shape"], -torch.inf), a["kernel_shape"], a.get("strides", (1, 1)))


def _slice(a: Attributes, x: Tensor, starts: Tensor, ends: Tensor, axes: Tensor, steps: Tensor | None = None) -> Tensor:
    where = [slice(None)] * x.ndim
    strides = torch.ones_like(starts) if steps is None else steps
    for start, end, axis, step in zip(starts.tolist(), ends.tolist(), axes.tolist(), strides.tolist(), strict=True):
        where[axis] = slice(start, end, step)
    return x[tuple(where)]


def _div(a: Attributes, x: Tensor, y: Tensor) -> Tensor:
    return x / y if x.is_floating_point() else torch.div(x, y, rounding_mode="trunc")


def _reshape(a: Attributes, x: Tensor, shape: Tensor) -> Tensor:
    return x.reshape([x.shape[i] if size == 0 else size for i, size in enumerate(shape.tolist())])


def _concat(a: Attributes, *parts: Tensor) -> Tensor:
    return torch.cat([part.reshape(1) if part.ndim == 0 else part for part in parts], a["axis"])


def _squeeze(a: Attributes, x: Tensor) -> Tensor:
    return x.squeeze(tuple(a["axes"]))


def _unsqueeze(a: Attributes, x: Tensor) -> Tensor:
    for axis in sorted(a["axes"]):
        x = x.unsqueeze(axis)
    return x


def _batch_norm(a: Attributes, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    return F.batch_norm(x, mean, variance, weight, bias, training=False, eps=a.get("epsilon", 1e-5))


OPERATIONS: dict[str, Callable[..., Tensor]] = {
    "Add": lambda a, x, y: x + y,
    "AveragePool": _average_pool,
    "BatchNormalization": _batch_norm,
    "Cast": lambda a, x: x.to(DTYPES[a["to"]]),
    "Clip": lambda a, x, low, high: x.clamp(low, high),
    "Concat": _concat,
    "Conv": _conv,
    "Div": _div,
    "Erf": lambda a, x: torch.erf(x),
    "GlobalAveragePool": lambda a, x: x.mean((2, 3), keepdim=True),
    "HardSigmoid": lambda a, x: (a.get("alpha", 0.2) * x + a.get("beta", 0.5)).clamp(0, 1),
    "HardSwish": lambda a, x: F.hardswish(x),  # no operation of these graphs: put in by _with_hard_swish
    "Identity": lambda a, x: x,
    "MatMul": lambda a, x, y: x @ y,
    "MaxPool": _max_pool,
    "Mul": lambda a, x, y: x * y,
    "Pow": lambda a, x, y: x**y,
    "ReduceMean": lambda a, x: x.mean(a["axes"], keepdim=bool(a.get("keepdims", 1))),
    "Relu": lambda a, x: x.relu(),
    "Reshape": _reshape,
    "Shape": lambda a, x: torch.tensor(x.shape),
    "Sigmoid": lambda a, x: x.sigmoid(),
    "Slice": _slice,
    "Softmax": lambda a, x: x.softmax(a["axis"]),
    "Sqrt": lambda a, x: x.sqrt(),
    "Squeeze": _squeeze,
    "Sub": lambda a, x, y: x - y,
    "Transpose": lambda a, x: x.permute(*a["perm"]),
    "Unsqueeze": _unsqueeze,
}


def _with_hard_swish(nodes: list[Node], constants: dict[str, Tensor]) -> list[Node]:
    """x·min(max(x + 3, 0), 6)/6, which PP-OCRv4 writes out, as one operation: an eighth less time for a gradient."""
    found: list[Node] = []
    uses = Counter(key for _, _, inputs, _ in nodes for key in inputs)
    numbers = {key: value.item() for key, value in constants.items() if value.numel() == 1}
    for node in nodes:
        found.append(node)
        last = found[-4:]
        if [name for name, *_ in last] != ["Add", "Clip", "Mul", "Div"]:
            continue
        (x, three), clip, product, quotient = (inputs for _, _, inputs, _ in last)
        chained = [clip[0], product, quotient[0]] == [last[0][3], [x, last[1][3]], last[2][3]]
        values = [numbers.get(key) for key in (three, *clip[1:], quotient[1])]
        if chained and values == [3, 0, 6, 6] and all(uses[output] == 1 for *_, output in last[:3]):
            found[-4:] = [("HardSwish", {}, [x], last[3][3])]
    return found


def _channels_last(x: Tensor) -> Tensor:
    """A quarter less time on a CPU, where most convolutions are of one pixel or of one channel."""
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x


class OnnxNetwork(nn.Module):
    """The graph of one input and one output in `path`, up to its last softmax: `network(x)` are the logits.

    Raises:
        ValueError: the graph does not end in a softmax, or has an operation that is not in `OPERATIONS`.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        model = onnx.load(str(path))
        self.metadata = {entry.key: entry.value for entry in model.metadata_props}
        self.constants = {entry.name: torch.tensor(numpy_helper.to_array(entry)) for entry in model.graph.initializer}
        self.nodes: list[Node] = []
        for node in model.graph.node:
            attributes = {entry.name: onnx.helper.get_attribute_value(entry) for entry in node.attribute}
            if node.op_type == "Constant":
                self.constants[node.output[0]] = torch.tensor(numpy_helper.to_array(attributes["value"]))
            else:
                self.nodes.append((node.op_type, attributes, list(node.input), node.output[0]))
        self.nodes = _with_hard_swish(self.nodes, self.constants)
        self.constants = {name: _channels_last(value) for name, value in self.constants.items()}
        unknown = {name for name, *_ in self.nodes} - OPERATIONS.keys()
        if unknown:
            raise ValueError(f"{path} uses {sorted(unknown)}, which onnx_network.py does not know; add them to OPERATIONS.")
        self.input = next(entry.name for entry in model.graph.input if entry.name not in self.constants)
        if self.nodes[-1][0] != "Softmax":
            raise ValueError(f"{path} does not end in a softmax; pass a graph that classifies.")
        self.output = self.nodes.pop()[2][0]

    def forward(self, x: Tensor) -> Tensor:
        values = self.constants | {self.input: _channels_last(x)}
        for name, attributes, inputs, output in self.nodes:
            values[output] = OPERATIONS[name](attributes, *(values[key] if key else None for key in inputs))
        return values[self.output]
