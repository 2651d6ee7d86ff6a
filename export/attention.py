"""The attention function that a model is traced with, and the cache object that it writes to.

transformers lets a model's attention and mask builders be replaced by name (`AttentionInterface`,
`AttentionMaskInterface`). Ours emit one `com.microsoft::GroupQueryAttention` a layer with the state in place, and no
mask graph: the mask builder hands down a `MaskSpec` that says what the mask would have been, found by evaluating
transformers' own mask function on sample positions rather than by trusting a config field.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from llmx.runtime.errors import UnsupportedModelError
from torch._subclasses.fake_tensor import FakeTensor
from transformers import AttentionInterface
from transformers.cache_utils import Cache
from transformers.masking_utils import AttentionMaskInterface

IMPLEMENTATION = "llmx"

#: GroupQueryAttention's input order (com.microsoft, onnxruntime 1.32); absent inputs are None.
_GQA_INPUTS = (
    "query", "key", "value", "past_key", "past_value", "seqlens_k", "total_sequence_length", "cos_cache", "sin_cache",
    "position_ids", "attention_bias", "head_sink", "k_scale", "v_scale", "q_norm_weight", "k_norm_weight",
    "query_seqlens",
)  # fmt: skip

#: Keyword arguments of transformers' attention functions that change nothing in inference without a mask tensor.
_IGNORED_KEYWORDS = frozenset(
    [
        "position_ids",
        "cache_position",
        "output_attentions",
        "output_router_logits",
        "output_hidden_states",
        "use_cache",
        "return_dict",
        "past_key_values",
        "past_key_value",
        "position_embeddings",
        "head_mask",
        "is_causal",
        "layer_idx",
        "logits_to_keep",
        "cu_seq_lens_q",
        "cu_seq_lens_k",
        "max_length_q",
        "max_length_k",
        "sliding_window",
        "num_items_in_batch",
        "deterministic",
    ]
)


@dataclass(frozen=True)
class MaskSpec:
    """What a layer may attend to: all earlier positions, or the last `window` of them, itself included."""

    window: int | None


@dataclass(frozen=True)
class UnknownMask:
    """A mask that the node cannot express. Refused where a layer attends with it: models also make masks they never use."""

    reason: str


@dataclass(frozen=True)
class LayerState:
    """Key and value state that one layer keeps. `head_dim` is the padded size that both tensors are stored with."""

    layer: int
    kv_heads: int
    head_dim: int
    window: int | None


@dataclass
class Recorder:
    """Collects what each layer keeps while a model runs. `steps` is None in the probing run, which computes nothing."""

    steps: StepInputs | None = None
    layers: dict[int, LayerState] = field(default_factory=dict)
    present: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    pending: tuple[int, torch.Tensor, torch.Tensor] | None = None


@dataclass(frozen=True)
class StepInputs:
    """The traced graph inputs that attention reads.

    `past[layer]` is (key, value), each [slots, kv_heads, max_length, head_dim]; `seqlens_k` int32 [batch];
    `total_sequence_length` int32 scalar; `query_seqlens` int32 [batch] or None where the target lacks the input.
    """

    past: dict[int, tuple[torch.Tensor, torch.Tensor]]
    seqlens_k: torch.Tensor
    total_sequence_length: torch.Tensor
    query_seqlens: torch.Tensor | None


class RecorderCache(Cache):
    """Hands new keys and values straight through: the attention node appends them to the state itself."""

    is_compileable = False

    def __init__(self, recorder: Recorder) -> None:
        super().__init__(layers=[])
        self.recorder = recorder

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.recorder.pending = (layer_idx, key_states, value_states)
        return key_states, value_states

    def get_seq_length(self, layer_idx: int | None = None) -> int:
        """0: positions come from the graph input `position_ids`, never from the cache's length. Asked for a layer, it is the
        layer that counts positions so (Llama 4's attention temperature), and a batch has several lengths.
        """
        if layer_idx is not None:
            raise UnsupportedModelError(f"layer {layer_idx} counts positions by the length of its cache")
        return 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return query_length, 0

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        return -1

    def _recurrent(self, *args: Any, **kwargs: Any) -> Any:
        raise UnsupportedModelError(
            "the model keeps a recurrent or convolution state, and only key/value state is exported so far"
        )

    get_conv_state = update_conv_state = get_recurrent_state = update_recurrent_state = has_previous_state = _recurrent


_recorder: Recorder | None = None


@contextmanager
def recording(recorder: Recorder) -> Iterator[RecorderCache]:
    """Make `recorder` the one that `attention` writes to; yields the cache to call the model with."""
    global _recorder
    previous, _recorder = _recorder, recorder
    try:
        yield RecorderCache(recorder)
    finally:
        _recorder = previous


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: MaskSpec | UnknownMask | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """One layer's attention as a GroupQueryAttention node (transformers' attention function interface).

    `query` [batch, heads, seq, head_dim], `key` and `value` [batch, kv_heads, seq, head_dim]; returns
    [batch, seq, heads, head_dim of value]. Raises UnsupportedModelError for whatever the node cannot express.
    """
    recorder = _recorder
    assert recorder is not None, "the llmx attention function runs only inside recording()"
    state = _layer_state(recorder, module, query, key, value, attention_mask, kwargs)
    batch, heads, seq, _ = query.shape
    value_dim = value.shape[-1]
    if recorder.steps is None:
        return query.new_empty(batch, seq, heads, value_dim), None
    attrs: dict[str, Any] = {"num_heads": heads, "kv_num_heads": state.kv_heads}
    attrs["scale"] = float(scaling) if scaling is not None else float(query.shape[-1] ** -0.5)
    if state.window is not None:
        attrs["local_window_size"] = state.window
    if softcap:
        attrs["softcap"] = float(softcap)
    inputs = _node_inputs(recorder.steps, state, query, key, value)
    if s_aux is not None:
        inputs["head_sink"] = s_aux.to(query.dtype)
    packed = inputs["query"]
    past_key, past_value = inputs["past_key"], inputs["past_value"]
    output, present_key, present_value = torch.onnx.ops.symbolic_multi_out(
        "com.microsoft::GroupQueryAttention",
        [inputs.get(name) for name in _GQA_INPUTS],
        attrs,
        dtypes=[packed.dtype, past_key.dtype, past_value.dtype],
        shapes=[packed.shape, past_key.shape, past_value.shape],
        version=1,
    )
    recorder.present[state.layer] = (present_key, present_value)
    return output.reshape(batch, seq, heads, state.head_dim)[..., :value_dim], None


def _layer_state(
    recorder: Recorder,
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: MaskSpec | UnknownMask | None,
    kwargs: dict[str, Any],
) -> LayerState:
    """What this call keeps, having checked that one GroupQueryAttention node can express the call."""
    where = f"{type(module).__name__}"
    unknown = sorted(name for name, v in kwargs.items() if v is not None and name not in _IGNORED_KEYWORDS)
    if unknown:
        raise UnsupportedModelError(
            f"{where} passes {', '.join(unknown)} to attention, which GroupQueryAttention has no input for"
        )
    if recorder.pending is None:
        raise UnsupportedModelError(
            f"{where} attends without writing to the cache (cross attention, or keys shared between layers)"
        )
    layer, written_key, written_value = recorder.pending
    recorder.pending = None
    # What it attends to may be made of what it wrote (latent attention expands a compressed row): the attended rows are
    # kept instead, which is the same as long as each row is made of its own token alone; verification tells.
    rows = (query.shape[2], key.shape[2], value.shape[2], written_key.shape[-2], written_value.shape[-2])
    if any(row != rows[0] for row in rows):
        raise UnsupportedModelError(
            f"{where} attends to other positions than those it wrote to the cache (layer {layer})"
        )
    if layer in recorder.layers and recorder.steps is None:
        raise UnsupportedModelError(f"{where} writes layer {layer} of the cache twice in one pass")
    if isinstance(mask, UnknownMask):
        raise UnsupportedModelError(mask.reason)
    if not isinstance(mask, MaskSpec):
        raise UnsupportedModelError(f"{where} attends without one of transformers' causal masks (layer {layer})")
    head_dim = -(-max(key.shape[-1], value.shape[-1]) // 8) * 8  # the node wants multiples of 8; zeros change no score
    state = LayerState(layer, int(key.shape[1]), head_dim, mask.window)
    recorder.layers[layer] = state
    return state


def _node_inputs(
    steps: StepInputs, state: LayerState, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The node's inputs by name: heads packed as [batch, seq, heads * head_dim], zero-padded to the stored size."""

    def packed(tensor: torch.Tensor) -> torch.Tensor:
        batch, heads, seq, dim = tensor.shape
        if dim != state.head_dim:
            tensor = torch.nn.functional.pad(tensor, (0, state.head_dim - dim))
        return tensor.transpose(1, 2).reshape(batch, seq, heads * state.head_dim)

    past_key, past_value = steps.past[state.layer]
    inputs = {
        "query": packed(query),
        "key": packed(key),
        "value": packed(value),
        "past_key": past_key,
        "past_value": past_value,
        "seqlens_k": steps.seqlens_k,
        "total_sequence_length": steps.total_sequence_length,
    }
    if steps.query_seqlens is not None:
        inputs["query_seqlens"] = steps.query_seqlens
    return inputs


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    **kwargs: Any,
) -> MaskSpec | UnknownMask:
    """transformers' mask builder interface: no tensor, only what the mask would say."""
    assert mask_function is not None
    try:
        return classify_mask(mask_function, local_size)
    except UnsupportedModelError as error:
        return UnknownMask(str(error))


def classify_mask(mask_function: Callable[..., Any], local_size: int | None) -> MaskSpec:
    """Evaluate `mask_function(batch, head, query, key)` on sample positions and name the mask that it is.

    Raises UnsupportedModelError when it is neither causal nor a sliding window of `local_size`.
    """
    with torch.utils._python_dispatch._disable_current_modes():
        positions = _sample_positions(local_size)
        query, key = positions[:, None], positions[None, :]
        zero = torch.zeros((), dtype=torch.long)
        try:
            allowed = torch.as_tensor(mask_function(zero, zero, query, key)).expand(len(positions), len(positions))
        except Exception as error:
            raise UnsupportedModelError(
                f"its attention mask depends on the input ({type(error).__name__}: {error})"
            ) from None
        if isinstance(allowed, FakeTensor):  # made of a traced tensor: chunks count from each row's own beginning
            raise UnsupportedModelError(
                "its attention mask is made of tensors (chunked attention?), and is neither causal nor a sliding window"
            )
        causal = key <= query
        if torch.equal(allowed, causal):
            return MaskSpec(None)
        if local_size is not None and torch.equal(allowed, causal & (key > query - local_size)):
            return MaskSpec(int(local_size))
    raise UnsupportedModelError(
        "its attention mask is neither causal nor a sliding window"
        + (f" (local size {local_size}: chunked?)" if local_size is not None else " (bidirectional?)")
    )


def _sample_positions(local_size: int | None) -> torch.Tensor:
    """Positions on both sides of every edge that a causal, windowed or chunked mask can have."""
    edges = [0, 17] if local_size is None else [0, local_size, 2 * local_size, 3 * local_size]
    near = {edge + delta for edge in edges for delta in (-2, -1, 0, 1, 2, 5)}
    return torch.tensor(sorted(p for p in near if p >= 0))


def register() -> None:
    """Make `attn_implementation="llmx"` known to transformers. Idempotent."""
    AttentionInterface.register(IMPLEMENTATION, attention)
    AttentionMaskInterface.register(IMPLEMENTATION, mask)
