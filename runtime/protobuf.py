"""Just enough of protobuf's wire format to see a graph's operators and weights.

The runtime does not depend on the onnx package, and onnxruntime does not list a model's nodes. Field numbers are
those of onnx.proto: ModelProto.graph = 7, GraphProto.node = 1, NodeProto.op_type = 4.
"""

from __future__ import annotations

from collections.abc import Iterator


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


def fields(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """(field number, payload) of every length-delimited field of a message; other fields are skipped.

    Raises ValueError for bytes that are no protobuf message.
    """
    at = 0
    try:
        while at < len(data):
            key, at = _varint(data, at)
            wire = key & 7
            if wire == 0:
                _, at = _varint(data, at)
            elif wire == 1:
                at += 8
            elif wire == 5:
                at += 4
            elif wire == 2:
                size, at = _varint(data, at)
                if at + size > len(data):
                    raise ValueError("cut short")
                yield key >> 3, data[at : at + size]
                at += size
            else:
                raise ValueError(f"wire type {wire}")
    except IndexError:
        raise ValueError("cut short") from None


def graph_operators(model: bytes) -> Iterator[str]:
    """The operator type of each node of a serialised ModelProto's main graph."""
    for number, graph in fields(memoryview(model)):
        if number == 7:
            for kind, node in fields(graph):
                if kind == 1:
                    yield next((bytes(v).decode() for n, v in fields(node) if n == 4), "?")


def stored_reads(model: bytes) -> dict[str, tuple[int, set[str]]]:
    """Weights that a serialised ModelProto's main graph keeps in another file: name -> (bytes, operators that read it).

    Field numbers: GraphProto.initializer = 5, TensorProto.name = 8 and external_data = 13, NodeProto.input = 1.
    """
    sizes: dict[str, int] = {}
    readers: dict[str, set[str]] = {}
    for number, graph in fields(memoryview(model)):
        if number != 7:
            continue
        for kind, message in fields(graph):
            parts = [(n, v) for n, v in fields(message)] if kind in (1, 5) else []
            if kind == 1:
                operator = next((bytes(v).decode() for n, v in parts if n == 4), "?")
                for name in (bytes(v).decode() for n, v in parts if n == 1):
                    readers.setdefault(name, set()).add(operator)
            elif kind == 5:
                entries = [{n: bytes(v).decode() for n, v in fields(v)} for n, v in parts if n == 13]
                length = next((int(e[2]) for e in entries if e.get(1) == "length"), 0)
                if length:
                    sizes[next(bytes(v).decode() for n, v in parts if n == 8)] = length
    return {name: (size, readers.get(name, set())) for name, size in sizes.items()}
