"""A PyTorch module as an ONNX graph, lowered by `transformers.exporters`.

The only module that touches transformers' experimental exporter API and torch.onnx internals. Three things are ours:

- Decomposition re-traces the whole program, which is most of an export's time. Where every operator already has an
  ONNX lowering and none mutates its input, the re-trace would change nothing but `aten.to.*`; `_decompose` then rewrites
  those in place. Anything unknown goes the long way.
- Type promotion re-runs every node under fake tensors to keep their shapes and dtypes; what it inserts leaves those of
  later nodes as they are, so `_fast_promotion` re-runs only what it inserts.
- `optimize=False`: onnxscript's optimiser is run by `llmx.export.passes`, with the rewrite rules that scale.
"""

from __future__ import annotations

import contextlib
import gc
import inspect
import io
import logging
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from types import CodeType, FrameType
from typing import Any

import onnx_ir as ir
import torch
from llmx.export.lengths import GUARDS
from llmx.export.shims import replaced, shimmed, symbolic_int
from llmx.runtime.errors import UnsupportedModelError
from torch import _prims_common
from torch.fx import config as fx_config
from torch.fx._lazy_graph_module import _use_lazy_graph_module
from torch.onnx._internal.exporter import _decomp, _fx_passes
from torch.onnx._internal.fx.passes import type_promotion
from transformers.exporters import utils as exporter_utils
from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

#: Both provider builds that llmx targets read this opset; the exporters' default is newer than the CUDA build.
OPSET = 21

_NOISY_LOGGERS = ("torch.onnx", "torch.export", "onnxscript", "onnx_ir", "transformers", "torch.fx")


def lower(module: torch.nn.Module, inputs: dict[str, Any], dynamic_shapes: dict[str, Any]) -> ir.Model:
    """Trace `module(**inputs)` and return its graph, unoptimised; weights are named as in `module.state_dict()`. Under
    which conditions on the inputs' sizes it is right, is in its `meta` (llmx.export.lengths).

    Raises UnsupportedModelError, naming the operator or the place in the source, when tracing or lowering fails.
    """
    try:
        return _lower(module, inputs, dynamic_shapes)
    except _ConstantSizeError:
        with symbolic_int(module):
            return _lower(module, inputs, dynamic_shapes)


class _ConstantSizeError(UnsupportedModelError):
    """The model's code makes a constant of a size."""


def _lower(module: torch.nn.Module, inputs: dict[str, Any], dynamic_shapes: dict[str, Any]) -> ir.Model:
    config = OnnxConfig(dynamic_shapes=dynamic_shapes, optimize=False, opset_version=OPSET)
    guards: list[str] = []
    with (
        quiet(),
        _fast_decomposition(guards),
        _fast_promotion(),
        _remembered_contiguity(),
        _no_bookkeeping(),
        _own_dtypes(),
        shimmed(),
    ):
        try:
            model, _ = OnnxExporter().export_program(module, inputs, config)
        except UnsupportedModelError:
            raise
        except Exception as error:
            deliberate = _cause(error, UnsupportedModelError)
            if deliberate is not None:
                raise deliberate from None
            line = _first_line(error)
            kind = _ConstantSizeError if line.startswith(_CONSTANT_SIZES) else UnsupportedModelError
            raise kind(f"tracing failed: {line}{_place(error)}") from error
    model.meta[GUARDS] = [guards]
    return model


def _cause(error: BaseException, kind: type[BaseException]) -> BaseException | None:
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, kind):
            return seen
        seen = seen.__cause__ or seen.__context__
    return None


def _first_line(error: BaseException) -> str:
    """The root cause's first line: the exporters wrap it in pages of advice. What they often say, in plain words."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error).strip().splitlines()
    for kind, pattern, words in _REASONS:
        found = re.search(pattern, text[0]) if text and type(error).__name__ == kind else None
        if found is not None:
            return words.format(found[1][:100])
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__


_CONSTANT_SIZES = "its code makes constants of the sizes"
_REASONS = [  # class of the error, what it says, what that means and what would have to change
    (
        "GuardOnDataDependentSymNode",
        r"expression (.*?) \(unhinted",
        "its code takes a branch by a value of its input ({}), and a graph has no branches; both sides would have to be computed",
    ),
    (
        "UserError",
        r"Constraints violated \((.*?)\)!",
        _CONSTANT_SIZES + " {}; they would have to stay sizes",
    ),
]


def forward_failed(error: BaseException, needs: str) -> UnsupportedModelError:
    """The refusal of a model whose code raised `error`; `needs` says what it would have to do, where the error does not."""
    line = _first_line(error)
    told = "would have to" in line
    return UnsupportedModelError(f"its forward pass failed: {line}{_place(error)}{'' if told else f'; {needs}'}")


def _place(error: BaseException) -> str:
    """` (modeling_x.py:123)`: the innermost frame that lies in a model's source."""
    while error.__cause__ is not None:
        error = error.__cause__
    place, frame = "", error.__traceback__
    while frame is not None:
        place = _in_model(frame.tb_frame.f_code, frame.tb_lineno) or place
        frame = frame.tb_next
    return place


def caller_place(frame: FrameType | None) -> str:
    """The same of the innermost of a frame and its callers."""
    while frame is not None:
        place = _in_model(frame.f_code, frame.f_lineno)
        if place:
            return place
        frame = frame.f_back
    return ""


def class_place(kind: type) -> str:
    """The same of a class that a model's source defines, where its `forward` begins if it is a module's; else empty."""
    function = vars(kind).get("forward", vars(kind).get("__init__"))
    code = getattr(inspect.unwrap(function), "__code__", None) if function is not None else None
    return _in_model(code, code.co_firstlineno) if code is not None else ""


def _in_model(code: CodeType, line: int) -> str:
    name = code.co_filename.replace("\\", "/")
    return f" ({name.rpartition('/')[2]}:{line})" if "/models/" in name or "modeling_" in name else ""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the exporters' prints, warnings and loggers: what the user must know, llmx says itself."""
    from transformers.utils import logging as transformers_logging

    bars = transformers_logging.is_progress_bar_enabled()
    levels = {name: logging.getLogger(name).level for name in _NOISY_LOGGERS}
    disabled = logging.root.manager.disable
    try:
        for name in levels:
            logging.getLogger(name).setLevel(logging.ERROR)
        logging.disable(logging.WARNING)
        transformers_logging.disable_progress_bar()
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        if bars:
            transformers_logging.enable_progress_bar()
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


@contextlib.contextmanager
def _no_bookkeeping() -> Iterator[None]:
    """No source line for each traced node, and no Python source of each intermediate graph."""
    with replaced(fx_config, "do_not_emit_stack_traces", True), _use_lazy_graph_module(True), uncollected():
        yield


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """No garbage collection meanwhile: a trace makes millions of objects that live until it ends, which the collector
    would walk again and again.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def _own_dtypes() -> AbstractContextManager[None]:
    """Leave the example inputs' dtypes: the exporter would cast a float32 recurrent state to its model's 16 bits."""
    return replaced(exporter_utils, "cast_leaf_tensors", lambda inputs, **_: inputs)


def _remembered_contiguity() -> AbstractContextManager[None]:
    """Answer "is it contiguous?" once for each symbolic shape and stride.

    Tracers ask several times for each node, and each answer multiplies and compares symbols: a fifth of a trace's time.
    Within one trace the answer for equal expressions is the same, and the guards of the first answer stand.
    """
    original = _prims_common.check_contiguous_sizes_strides
    answers: dict[Any, bool] = {}

    def key(numbers: Any) -> tuple[Any, ...]:
        return tuple(number if isinstance(number, int) else number.node.expr for number in numbers)

    def remembered(sizes: Any, strides: Any, false_if_dde: bool = False) -> bool:
        asked = (key(sizes), key(strides), false_if_dde)
        if asked not in answers:
            answers[asked] = original(sizes, strides, false_if_dde)
        return answers[asked]

    return replaced(_prims_common, "check_contiguous_sizes_strides", remembered)


def _fast_promotion() -> AbstractContextManager[None]:
    interpreter = type_promotion._TypePromotionInterpreter
    original = interpreter.run_node

    def run_node(self: Any, node: torch.fx.Node) -> Any:
        if node.op != "call_function" or "val" not in node.meta:
            return original(self, node)
        with self._set_current_node(node):
            rule = type_promotion.get_type_promotion_rule(node, self.type_promotion_table)
            if rule is not None:
                self._maybe_promote_node(node, rule)
        return node.meta["val"]

    return replaced(interpreter, "run_node", run_node)


def _fast_decomposition(guards: list[str]) -> AbstractContextManager[None]:
    """With `_decompose` in its place; the tracer's guards, in Python, are put into `guards`."""
    original = _fx_passes.decompose_with_registry

    def decompose(program: torch.export.ExportedProgram, registry: Any) -> torch.export.ExportedProgram:
        guards.extend(program._guards_code)
        if not _decompose(program, registry):
            return original(program, registry)
        return program

    return replaced(_fx_passes, "decompose_with_registry", decompose)


def _decompose(program: torch.export.ExportedProgram, registry: Any) -> bool:
    """Rewrite `program` in place and return True, or leave it and return False when it needs the re-trace."""
    lowered = set(_decomp.get_onnx_implemented_overloads(registry))
    table = _decomp.create_onnx_friendly_decomposition_table(lowered)
    graphs = [module.graph for module in program.graph_module.modules() if isinstance(module, torch.fx.GraphModule)]
    nodes = [node for graph in graphs for node in graph.nodes if node.op == "call_function"]
    if len(graphs) > 1 or any(_needs_retrace(node, lowered, table) for node in nodes):
        return False
    for node in nodes:
        if node.target in _CONVERSIONS:
            _rewrite_conversion(node)
    program.graph_module.recompile()
    return True


_CONVERSIONS: dict[Any, Callable[[Any], torch.dtype | None]] = {
    torch.ops.aten.to.dtype: lambda node: node.args[1] if len(node.args) > 1 else node.kwargs["dtype"],
    torch.ops.aten.to.device: lambda node: node.args[2] if len(node.args) > 2 else node.kwargs["dtype"],
    torch.ops.aten.to.dtype_layout: lambda node: node.kwargs.get("dtype"),
}


def _needs_retrace(node: torch.fx.Node, lowered: set[Any], table: dict[Any, Any]) -> bool:
    target = node.target
    if target in _CONVERSIONS:
        return "val" not in node.meta or "val" not in node.args[0].meta
    if target in lowered:
        return "val" not in node.meta  # put there by a fix of the exporters: the re-trace finds its shape
    if not isinstance(target, torch._ops.OpOverload):
        return isinstance(target, torch._ops.HigherOrderOperator)
    if target.namespace != "aten":  # the exporter's own symbolic ops, and asserts on symbolic sizes
        return target in table or bool(target._schema.is_mutable)
    return not target.name().startswith(("aten::_assert", "aten::sym_", "aten::_check"))


def _rewrite_conversion(node: torch.fx.Node) -> None:
    """`x.to(…)`: dropped where it keeps the dtype, else the cast that its decomposition would have become."""
    source = node.args[0]
    dtype = _CONVERSIONS[node.target](node)
    value = node.meta["val"]
    is_output = any(user.op == "output" for user in node.users)  # the program's signature names it: a cast in its place
    if not is_output and (dtype is None or source.meta["val"].dtype == value.dtype):
        node.replace_all_uses_with(source)
        node.graph.erase_node(node)
        return
    node.target = torch.ops.aten._to_copy.default
    node.args = (source,)
    node.kwargs = {"dtype": value.dtype}
