"""A pass for the CPU provider's `GroupQueryAttention` in a decode step, whose query is a single position."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from llmx.export.fusions import MICROSOFT
from llmx.export.values import constant
from onnx_ir.passes import InPlacePass, PassResult

#: `GroupQueryAttention`'s input (com.microsoft, onnxruntime 1.32).
_HEAD_SINK = 11
#: A sink of this logit takes no part in any softmax: e^(it - any score) is 0.
_NO_SINK = np.finfo(np.float32).min


class StepAttention(InPlacePass):
    """Of the ways that the operator has to compute a step, have it take the fast one; the numbers stay.

    Two things decide (gqa_attention_base.h and sgemm.cpp of onnxruntime 1.32):

    - Only a product with a factor of 1 is computed row by row from the keys as they lie; with any other, they are first
      copied into panels, for each query head anew. So the query is multiplied by `scale`, and the node's becomes 1.
    - The tiled ("flash") kernel copies them in either case, and is chosen unless there is a sink: so there is one, of no weight.

    Left alone: windows, of which the tiled kernel reads only the part within, and types other than float32.
    """

    def call(self, model: ir.Model) -> PassResult:
        factors: dict[tuple[float, int, int], ir.Value] = {}
        sinks: dict[int, ir.Value] = {}
        modified = False
        for node in list(model.graph):
            if (node.domain, node.op_type) == (MICROSOFT, "GroupQueryAttention") and _is_plain(node):
                self._rewrite(model, node, factors, sinks)
                modified = True
        return PassResult(model, modified=modified)

    def _rewrite(
        self,
        model: ir.Model,
        node: ir.Node,
        factors: dict[tuple[float, int, int], ir.Value],
        sinks: dict[int, ir.Value],
    ) -> None:
        query = node.inputs[0]
        assert query is not None
        heads, scale = node.attributes["num_heads"].as_int(), node.attributes["scale"].as_float()
        further = 0 if node.inputs[1] is not None else 2 * node.attributes["kv_num_heads"].as_int()
        past = node.inputs[3]
        assert past is not None and past.shape is not None
        key = (scale, heads * int(past.shape[3]), further * int(past.shape[3]))
        if key not in factors:
            values = np.concatenate([np.full(key[1], scale, np.float32), np.ones(key[2], np.float32)])
            factors[key] = constant(model.graph, f"query_scale_{len(factors)}", values)
        scaled = ir.node("Mul", [query, factors[key]])
        scaled.outputs[0].type, scaled.outputs[0].shape = query.type, query.shape
        model.graph.insert_before(node, scaled)
        node.replace_input_with(0, scaled.outputs[0])
        node.attributes["scale"] = ir.AttrFloat32("scale", 1.0)
        if heads not in sinks:
            sinks[heads] = constant(model.graph, f"no_head_sink_{heads}", np.full(heads, _NO_SINK, np.float32))
        node.resize_inputs(max(len(node.inputs), _HEAD_SINK + 1))
        if node.inputs[_HEAD_SINK] is None:
            node.replace_input_with(_HEAD_SINK, sinks[heads])


def _is_plain(node: ir.Node) -> bool:
    query = node.inputs[0]
    scale, window = node.attributes.get("scale"), node.attributes.get("local_window_size")
    plain = scale is not None and scale.as_float() != 1.0 and (window is None or window.as_int() < 0)
    return plain and query is not None and query.dtype == ir.DataType.FLOAT
