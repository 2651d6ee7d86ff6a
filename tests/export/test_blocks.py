"""Block-wise quantization: what rounding costs, the packed layout, and that onnxruntime reads it as it is meant."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from llmx.export import weights
from llmx.export.blocks import Scheme, round_to_nearest, unpacked
from llmx.export.weights import SourceModel, read_index

SCHEMES = [Scheme(bits, size, symmetric) for bits in (4, 8) for size in (16, 32) for symmetric in (True, False)]


def matrix(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Values of several scales, a row of zeros, a block of one sign, an outlier."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * torch.rand(rows, 1, generator=generator)
    weight[1] = 0
    weight[2, :16] = weight[2, :16].abs() + 3
    weight[3, 5] = 50
    return weight


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("columns", [64, 40])
def test_each_value_is_rounded_to_the_nearest(scheme: Scheme, columns: int) -> None:
    weight = matrix(24, columns)
    blocks = round_to_nearest(weight, scheme, torch.float32)
    step = blocks.scales.abs().repeat_interleave(scheme.block_size, dim=1)[:, :columns]
    error = (blocks.dequantized() - weight).abs()
    # symmetric: the value opposite to the farthest may lack the last step
    assert bool((error <= step * (1.001 if scheme.symmetric else 0.501) + 1e-7).all())
    assert float((error <= step * 0.501 + 1e-7).float().mean()) > 0.9
    assert bool((blocks.dequantized()[1] == 0).all())
    if scheme.symmetric:
        assert blocks.zero_points is None and int(blocks.codes.max()) < 1 << scheme.bits
    else:
        assert blocks.zero_points is not None and blocks.zero_points.shape == blocks.scales.shape


@pytest.mark.parametrize("bits", [4, 8])
def test_layout(bits: int) -> None:
    blocks = round_to_nearest(matrix(5, 40), Scheme(bits, 16, False), torch.float32)
    assert blocks.zero_points is not None
    packed, zero_points = blocks.packed_codes(), blocks.packed_zero_points()
    assert packed.shape == (5, blocks.scheme.row_bytes(40)) == (5, 3 * 16 * bits // 8)
    assert zero_points.shape == (5, blocks.scheme.zero_point_bytes(40)) == (5, 2 if bits == 4 else 3)
    for row in range(5):
        for column in range(48):
            code = packed[row, column] if bits == 8 else packed[row, column // 2] >> (4 * (column % 2)) & 15
            # what fills up the last block stands for zero
            assert code == (blocks.codes[row, column] if column < 40 else blocks.zero_points[row, 2])
    assert torch.equal(unpacked(packed, bits, 40), blocks.codes)
    assert torch.equal(unpacked(zero_points, bits, 3), blocks.zero_points)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("columns", [64, 40])
def test_onnxruntime_reads_the_same_values(scheme: Scheme, columns: int) -> None:
    import onnxruntime

    rows = 24
    blocks = round_to_nearest(matrix(rows, columns), scheme, torch.float32)
    count = scheme.blocks(columns)
    constants = {
        "codes": blocks.packed_codes().view(rows, count, -1).numpy(),
        "table": blocks.packed_codes().numpy(),
        "scales": blocks.scales.numpy(),
    }
    if blocks.zero_points is not None:
        constants["zeros"] = blocks.packed_zero_points().numpy()
    values = {name: ir.Value(name=name, const_value=ir.tensor(array, name=name)) for name, array in constants.items()}
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["n", columns]))
    ids = ir.Value(name="ids", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(["n"]))
    zeros = [values["zeros"]] if "zeros" in values else []
    sizes = {"bits": scheme.bits, "block_size": scheme.block_size}
    attributes = {**sizes, "K": columns, "N": rows}
    product = ir.node("MatMulNBits", [x, values["codes"], values["scales"], *zeros], attributes, domain="com.microsoft")
    nodes, inputs = [product], [x]
    if columns % scheme.block_size == 0:
        axes = {**sizes, "gather_axis": 0, "quantize_axis": 1}
        arguments = [values["table"], ids, values["scales"], *zeros]
        nodes.append(ir.node("GatherBlockQuantized", arguments, axes, domain="com.microsoft"))
        inputs.append(ids)
    outputs = []
    for number, node in enumerate(nodes):
        node.outputs[0].name, node.outputs[0].type = f"y{number}", ir.TensorType(ir.DataType.FLOAT)
        outputs.append(node.outputs[0])
    used = [v for v in values.values() if v.uses()]
    graph = ir.Graph(inputs, outputs, nodes=nodes, initializers=used, opset_imports={"": 21, "com.microsoft": 1})
    raw = ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
    session = onnxruntime.InferenceSession(raw, providers=["CPUExecutionProvider"])
    want = blocks.dequantized()
    feeds = {"x": np.eye(columns, dtype=np.float32)}
    if len(nodes) == 2:
        feeds["ids"] = np.array([3, 0, 23, 1])
    results = session.run(None, feeds)
    np.testing.assert_allclose(results[0], want.T.numpy(), rtol=1e-5, atol=1e-6)
    if len(nodes) == 2:
        np.testing.assert_allclose(results[1], want[[3, 0, 23, 1]].numpy(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_come_in_pieces(dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import save_file

    monkeypatch.setattr(weights, "_ROWS", 4 * 33 * 7)  # seven rows of float32
    weight = torch.randn(50, 33).to(dtype)
    save_file({"pad": torch.ones(3), "w": weight}, tmp_path / "model.safetensors")
    stored = SourceModel(torch.nn.Module(), read_index(tmp_path))
    for source in (stored, SourceModel(torch.nn.Module(), {})):
        pieces = list(source.rows("w", weight))
        assert len(pieces) == 8 and all(piece.dtype == torch.float32 for piece in pieces)
        assert torch.equal(torch.cat(pieces), weight.float())
        [turned] = source.rows("w", weight, transposed=True)
        assert torch.equal(turned, weight.float().T)
