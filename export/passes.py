"""Graph rewrites, each a small pass that says whether it changed the graph.

`common_passes`, `prefill_passes` and `decode_passes` are the visible lists. A pass works on onnx-ir models in place and keeps inputs,
outputs and their names unless its docstring says otherwise.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import onnx_ir as ir
from llmx.export.feedback import Feedback, GreedyTokens
from llmx.export.fusions import RmsNorm, RotaryInAttention, SkipRmsNorm
from llmx.export.packed import is_parameter
from llmx.export.packing import PackedPair, PackedQkv, QuickSilu, StraightHeads
from llmx.export.step_attention import StepAttention
from llmx.export.targets import Target
from llmx.export.trace import GATHER_POSITIONS, HIDDEN
from onnx_ir.passes import InPlacePass, PassResult, Sequential
from onnx_ir.passes.common import (
    CommonSubexpressionEliminationPass,
    IdentityEliminationPass,
    InlinePass,
    LiftConstantsToInitializersPass,
    RemoveUnusedFunctionsPass,
    RemoveUnusedNodesPass,
    RemoveUnusedOpsetsPass,
)
from onnxscript import rewriter
from onnxscript.optimizer._constant_folding import FoldConstantsPass


class _GatherPositionsPass(InPlacePass):
    """Base of the two ways to lower the placeholder that gathers the asked positions' hidden states."""

    def call(self, model: ir.Model) -> PassResult:
        found = [node for node in model.graph if (node.domain, node.op_type) == GATHER_POSITIONS]
        for node in found:
            replacement = self.replace(model, node)
            ir.convenience.replace_all_uses_with(node.outputs[0], replacement, replace_graph_outputs=True)
            model.graph.remove(node, safe=True)
        model.opset_imports.pop(GATHER_POSITIONS[0], None)
        return PassResult(model, modified=bool(found))

    def replace(self, model: ir.Model, node: ir.Node) -> ir.Value:
        raise NotImplementedError


class GatherAskedPositions(_GatherPositionsPass):
    """Prefill: `GatherND` over [batch, seq, hidden] with indices [batch, asked, 1] and one batch dimension."""

    def replace(self, model: ir.Model, node: ir.Node) -> ir.Value:
        hidden, positions = node.inputs
        axis = ir.node("Constant", [], {"value": ir.tensor([2], dtype=ir.DataType.INT64)})
        index = ir.node("Unsqueeze", [positions, axis.outputs[0]])
        gather = ir.node("GatherND", [hidden, index.outputs[0]], {"batch_dims": 1})
        model.graph.insert_before(node, [axis, index, gather])
        gather.outputs[0].type, gather.outputs[0].shape = node.outputs[0].type, node.outputs[0].shape
        return gather.outputs[0]


class KeepTheOnlyPosition(_GatherPositionsPass):
    """Decode: the step has one position and its logits are wanted, so the gather goes, and its input with it."""

    def replace(self, model: ir.Model, node: ir.Node) -> ir.Value:
        hidden, positions = node.inputs
        assert hidden is not None and positions is not None
        if positions in model.graph.inputs:
            model.graph.inputs.remove(positions)
        return hidden


class OneTokenPerRow(InPlacePass):
    """Decode: fix the sequence size of every graph input at 1, so that shape arithmetic folds away."""

    def call(self, model: ir.Model) -> PassResult:
        modified = False
        for value in [*model.graph.inputs, *model.graph.outputs]:
            shape = value.shape
            if shape is None or ("seq" not in [str(d) for d in shape] and "asked" not in [str(d) for d in shape]):
                continue
            value.shape = ir.Shape([1 if str(dim) in ("seq", "asked") else dim for dim in shape])
            modified = True
        for node in model.graph:  # shapes recorded for a symbolic sequence are stale now, and folding would trust them
            for output in node.outputs:
                if output.shape is not None and not output.is_graph_output() and not output.shape.is_static():
                    output.shape = None
        return PassResult(model, modified=modified)


class TransposedMatMul(InPlacePass):
    """`MatMul(x, Transpose(weight))` with a stored 2-D weight becomes `FusedMatMul(x, weight, transB=1)`.

    Checkpoints store linear layers as [out, in]. Left as a Transpose, the runtime would materialise a second copy of
    every weight, of a tied embedding for good. FusedMatMul: com.microsoft, CPU and CUDA.
    """

    def call(self, model: ir.Model) -> PassResult:
        modified = False
        for node in model.graph:
            if node.op_type != "MatMul" or node.domain != "" or node.inputs[1] is None:
                continue
            transpose = node.inputs[1].producer()
            if transpose is None or transpose.op_type != "Transpose" or transpose.domain != "":
                continue
            weight = transpose.inputs[0]
            perm = transpose.attributes.get("perm")
            if weight is None or not weight.is_initializer() or weight.shape is None or len(weight.shape) != 2:
                continue
            if perm is not None and list(perm.as_ints()) != [1, 0]:
                continue
            node.replace_input_with(1, weight)
            node.op_type, node.domain = "FusedMatMul", "com.microsoft"
            node.version = 1
            node.attributes["transB"] = ir.AttrInt64("transB", 1)
            modified = True
        if modified:
            model.opset_imports.setdefault("com.microsoft", 1)
        return PassResult(model, modified=modified)


class UnnamedOutputs(InPlacePass):
    """Optional outputs that nothing reads lose the names that copying the graph gave them: nobody computes them."""

    def call(self, model: ir.Model) -> PassResult:
        modified = False
        for node in model.graph:
            if node.op_type == "SkipSimplifiedLayerNormalization":
                for value in node.outputs[1:3]:
                    if value.name and not value.uses() and not value.is_graph_output():
                        value.name, modified = "", True
        return PassResult(model, modified=modified)


class Bfloat16InFloat32(InPlacePass):
    """bfloat16 arithmetic of a model in another dtype (Falcon's ALiBi slopes), as float32 between casts.

    Rounded to bfloat16 after each node, that is how PyTorch computes it on a CPU, and the CPU provider has no bfloat16
    kernels. A model whose parameters are bfloat16 is left alone.
    """

    def call(self, model: ir.Model) -> PassResult:
        bfloat16, float32 = ir.DataType.BFLOAT16, ir.DataType.FLOAT
        if any(value.dtype == bfloat16 for value in model.graph.initializers.values() if is_parameter(value)):
            return PassResult(model, modified=False)
        modified = False
        for node in list(model.graph):
            if node.op_type == "Cast":
                continue
            for index, value in enumerate(node.inputs):
                if value is not None and value.dtype == bfloat16:
                    wide = _cast(value, float32)
                    model.graph.insert_before(node, wide)
                    node.replace_input_with(index, wide.outputs[0])
                    modified = True
            for value in node.outputs:
                if value.dtype == bfloat16:
                    narrow = _cast(value, bfloat16)
                    ir.convenience.replace_all_uses_with(value, narrow.outputs[0])
                    narrow.replace_input_with(0, value)
                    value.type = ir.TensorType(float32)
                    model.graph.insert_after(node, narrow)
                    modified = True
        return PassResult(model, modified=modified)


def _cast(value: ir.Value, dtype: ir.DataType) -> ir.Node:
    node = ir.node("Cast", [value], {"to": int(dtype)})
    node.outputs[0].type, node.outputs[0].shape = ir.TensorType(dtype), value.shape
    return node


class DeduplicateConstants(InPlacePass):
    """Small equal constants become one, so that equal nodes on them can. Parameters are left alone: while exporting,
    their memory is uninitialised, and equal by chance.
    """

    _MOST_ELEMENTS = 1024

    def call(self, model: ir.Model) -> PassResult:
        seen: dict[tuple[object, ...], ir.Value] = {}
        modified = False
        for name, value in list(model.graph.initializers.items()):
            tensor = value.const_value
            if tensor is None or is_parameter(value) or tensor.size > self._MOST_ELEMENTS or value.is_graph_output():
                continue
            first = seen.setdefault((tensor.dtype, tuple(tensor.shape), tensor.tobytes()), value)
            if first is not value:
                ir.convenience.replace_all_uses_with(value, first)
                del model.graph.initializers[name]
                modified = True
        return PassResult(model, modified=modified)


@functools.cache
def _rewrite_rules() -> rewriter.RewriteRuleSet:
    """onnxscript's default rules, less those with several outputs.

    To match one of those, the rewriter indexes the whole graph anew for each node: quadratic in the number of layers.
    """
    rules = [rule for rule in rewriter._DEFAULT_REWRITE_RULES if rule._target_pattern.num_outputs == 1]
    return rewriter.RewriteRuleSet(rules)


def _simplify() -> list[ir.passes.PassBase]:
    return [
        FoldConstantsPass(shape_inference=True, input_size_limit=8192, output_size_limit=512 * 512),
        rewriter.RewritePass(_rewrite_rules()),
        RemoveUnusedNodesPass(),
        RemoveUnusedFunctionsPass(),
        RemoveUnusedOpsetsPass(),
    ]


def _tidy() -> list[ir.passes.PassBase]:
    return [
        LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        DeduplicateConstants(),
        CommonSubexpressionEliminationPass(),
        IdentityEliminationPass(),
        TransposedMatMul(),
        RemoveUnusedNodesPass(),
        RemoveUnusedOpsetsPass(),
    ]


def common_passes(context_length: int, target: Target) -> list[ir.passes.PassBase]:
    """From the raw trace to a simplified and fused graph, the prefill graph but for its gather."""
    return [
        InlinePass(),
        *_simplify(),
        *_tidy(),
        RmsNorm(),
        SkipRmsNorm(),
        RotaryInAttention(context_length),
        StraightHeads(),
        PackedQkv(),
        *([QuickSilu()] if target.on_device else [PackedPair()]),  # onnxruntime fuses the activation by itself on a CPU
        Bfloat16InFloat32(),
        RemoveUnusedNodesPass(),
    ]


def prefill_passes(target: Target) -> list[ir.passes.PassBase]:
    """The prefill graph: logits of the asked positions; for a device, also the most likely tokens after them."""
    return [GatherAskedPositions(), *_tidy(), *([GreedyTokens()] if target.on_device else [])]


def decode_passes(target: Target) -> list[ir.passes.PassBase]:
    """The decode graph: [batch, 1] tokens, no `logits_positions` input; for a device, also the next step's inputs."""
    further = [GreedyTokens(), Feedback()] if target.on_device else [StepAttention()]
    return [KeepTheOnlyPosition(), OneTokenPerRow(), *_simplify(), *_tidy(), *further, UnnamedOutputs()]


def encoder_graph(traced: ir.Model) -> ir.Model:
    """The one graph of an encoder, simplified and fused, from its trace. Consumes `traced`."""
    outputs = [(value.name, value.shape) for value in traced.graph.outputs]
    with hidden_parameters(traced):
        passes = [InlinePass(), *_simplify(), *_tidy(), RmsNorm(), SkipRmsNorm(), Bfloat16InFloat32(), *_tidy()]
        Sequential(*passes)(traced)
    for value, (name, shape) in zip(traced.graph.outputs, outputs, strict=True):
        value.name, value.shape = name, shape  # a fused node's output takes the place, not the name
    return traced


def both_graphs(traced: ir.Model, context_length: int, target: Target) -> tuple[ir.Model, ir.Model]:
    """(prefill, decode) from one trace. Consumes `traced`; the two share initializer tensors, not values."""
    outputs = [(value.name, value.shape) for value in traced.graph.outputs]
    with hidden_parameters(traced):
        Sequential(*common_passes(context_length, target))(traced)
    decode = traced.clone()
    for index, (name, _) in enumerate(outputs):
        if name == HIDDEN:  # prefill's alone: nobody asks for a step's
            del decode.graph.outputs[index]
    for model, passes in ((traced, prefill_passes(target)), (decode, decode_passes(target))):
        with hidden_parameters(model):
            Sequential(*passes)(model)
    for graph, asked in ((traced.graph, "asked"), (decode.graph, 1)):
        kept = [item for item in outputs if graph is traced.graph or item[0] != HIDDEN]
        for value, (name, shape) in zip(graph.outputs[: len(kept)], kept, strict=True):
            # a replaced node's output takes the place, not the name, and inferring may have renamed its sizes
            value.name = name
            value.shape = shape and ir.Shape([asked if str(dim) == "asked" else dim for dim in shape])
    return traced, decode


@contextlib.contextmanager
def hidden_parameters(model: ir.Model) -> Iterator[None]:
    """Take the parameters' values away while passes run.

    Their memory is uninitialised until the checkpoint is read, at writing: a pass that folded it, or dropped a bias
    because it looks like zeros, would write a wrong graph. Without a value they are opaque, whatever a pass looks at.
    """
    hidden = {v.name: v.const_value for v in model.graph.initializers.values() if is_parameter(v)}
    for name in hidden:
        model.graph.initializers[name].const_value = None
    try:
        yield
    finally:
        for name, tensor in hidden.items():
            if name in model.graph.initializers:
                model.graph.initializers[name].const_value = tensor
