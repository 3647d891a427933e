"""Reads the weights in an ONNX file: the few fields of its protobuf that hold them, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...errors import MagMaxError

# Field numbers of ONNX's messages: ModelProto.graph; GraphProto.node, .initializer; NodeProto.input, .output,
# .op_type; TensorProto.dims, .data_type, .name, .raw_data. FLOAT is a data type.
GRAPH, NODE, INITIALIZER = 7, 1, 5
INPUT, OUTPUT, OPERATION = 1, 2, 4
DIMS, DATA_TYPE, NAME, RAW_DATA = 1, 2, 8, 9
FLOAT = 1


@dataclass(frozen=True)
class OnnxNode:
    """An operation, and the names of what goes in and comes out."""

    operation: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def read_onnx(path: Path) -> tuple[dict[str, np.ndarray], list[OnnxNode]]:
    """The float32 weights by name, and the operations in order. Raises MagMaxError where the file is no ONNX model."""
    weights: dict[str, np.ndarray] = {}
    nodes: list[OnnxNode] = []
    try:
        for graph in _iterate_submessages(memoryview(path.read_bytes()), GRAPH):
            nodes += [_parse_node(part) for part in _iterate_submessages(graph, NODE)]
            weights.update(
                weight for part in _iterate_submessages(graph, INITIALIZER) if (weight := _parse_initializer(part))
            )
    except (ValueError, IndexError) as error:
        raise MagMaxError(f"{path} is no ONNX model: {error}") from error
    if not weights:
        raise MagMaxError(f"{path} holds no float32 weights")
    return weights, nodes


def named_weights(weights: dict[str, np.ndarray], nodes: list[OnnxNode]) -> dict[str, np.ndarray]:
    """The weights under the names that the exported model gave them.

    An exporter turns `x @ weight.T + bias` into a product with an unnamed, transposed matrix and a sum with NAME.bias;
    the matrix is put back as NAME.weight.
    """
    named = {name: weight for name, weight in weights.items() if "::" not in name}
    product = {node.outputs[0]: node.inputs[1] for node in nodes if node.operation == "MatMul"}
    for node in nodes:
        if node.operation != "Add":
            continue
        for bias, summand in (node.inputs, node.inputs[::-1]):
            matrix = product.get(summand)
            if bias.endswith(".bias") and matrix in weights:
                named[bias.removesuffix("bias") + "weight"] = weights[matrix].T
    return named


def _parse_node(part: memoryview) -> OnnxNode:
    strings: dict[int, list[str]] = {INPUT: [], OUTPUT: [], OPERATION: []}
    for field, value in _iterate_fields(part):
        if field in strings and isinstance(value, memoryview):
            strings[field].append(str(value, "utf-8"))
    return OnnxNode("".join(strings[OPERATION]), tuple(strings[INPUT]), tuple(strings[OUTPUT]))


def _parse_initializer(part: memoryview) -> tuple[str, np.ndarray] | None:
    shape: list[int] = []
    name, kind, raw = "", 0, memoryview(b"")
    for field, value in _iterate_fields(part):
        if field == DIMS:
            shape += [value] if isinstance(value, int) else _read_packed_varints(value)
        elif field == DATA_TYPE and isinstance(value, int):
            kind = value
        elif isinstance(value, memoryview):
            name = str(value, "utf-8") if field == NAME else name
            raw = value if field == RAW_DATA else raw
    if kind != FLOAT:
        return None
    return name, np.frombuffer(raw, "<f4").reshape(shape)


def _iterate_submessages(message: memoryview, wanted: int) -> Iterator[memoryview]:
    for field, value in _iterate_fields(message):
        if field == wanted and isinstance(value, memoryview):
            yield value


def _iterate_fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """The fields of a message: a number, and a number or bytes (protobuf's wire format)."""
    at = 0
    while at < len(message):
        key, at = _read_varint(message, at)
        kind = key & 7
        if kind == 0:
            value, at = _read_varint(message, at)
            yield key >> 3, value
            continue
        if kind == 2:
            size, at = _read_varint(message, at)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError(f"a field of the unknown kind {kind} at byte {at}")
        if at + size > len(message):
            raise ValueError(f"a field of {size} bytes at byte {at} goes beyond the end")
        yield key >> 3, message[at : at + size]
        at += size


def _read_varint(message: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def _read_packed_varints(packed: memoryview) -> list[int]:
    numbers, at = [], 0
    while at < len(packed):
        value, at = _read_varint(packed, at)
        numbers.append(value)
    return numbers
