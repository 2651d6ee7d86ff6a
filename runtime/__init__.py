"""llmx.runtime: a model package in, tokens out, on numpy, onnxruntime and tokenizers alone.

from llmx.runtime import LLM, SamplingParams

llm = LLM("artifacts/demo")
[out] = llm.generate(["ROMEO:"], SamplingParams(max_tokens=64))
print(out.outputs[0].text)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmx.runtime.aio import AsyncLLM
    from llmx.runtime.aio_session import AsyncSession
    from llmx.runtime.chat_output import ChatDelta, ChatMessage, ToolCall
    from llmx.runtime.encoder import Filled, Label, Ranked, TokenLabel
    from llmx.runtime.errors import (
        ClosedError,
        ContextLengthError,
        FamilyError,
        LlmxError,
        MissingDependencyError,
        OutOfMemoryError,
        PackageError,
        ProviderError,
        RequestError,
    )
    from llmx.runtime.llm import LLM
    from llmx.runtime.manifest import Manifest, load_manifest
    from llmx.runtime.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput, StreamPiece
    from llmx.runtime.params import SamplingParams
    from llmx.runtime.perplexity import Perplexity
    from llmx.runtime.session import Session
    from llmx.runtime.speculation import Speculation
    from llmx.runtime.structured import StructuredOutputsParams
    from llmx.runtime.transcribe import Transcript

__all__ = [
    "LLM",
    "AsyncLLM",
    "AsyncSession",
    "ChatDelta",
    "ChatMessage",
    "ClosedError",
    "CompletionOutput",
    "ContextLengthError",
    "FamilyError",
    "Filled",
    "Label",
    "LlmxError",
    "Logprob",
    "Manifest",
    "MissingDependencyError",
    "OutOfMemoryError",
    "PackageError",
    "Perplexity",
    "ProviderError",
    "Ranked",
    "RequestError",
    "RequestMetrics",
    "RequestOutput",
    "SamplingParams",
    "Session",
    "Speculation",
    "StreamPiece",
    "StructuredOutputsParams",
    "TokenLabel",
    "ToolCall",
    "Transcript",
    "load_manifest",
]

#: Where each name is. A module is imported when one of its names is asked for: a process that generates text waits for
#: neither asyncio nor the formats of tool calls.
_MODULES = {
    "aio": ("AsyncLLM",),
    "aio_session": ("AsyncSession",),
    "chat_output": ("ChatDelta", "ChatMessage", "ToolCall"),
    "encoder": ("Filled", "Label", "Ranked", "TokenLabel"),
    "errors": (
        "ClosedError",
        "ContextLengthError",
        "FamilyError",
        "LlmxError",
        "MissingDependencyError",
        "OutOfMemoryError",
        "PackageError",
        "ProviderError",
        "RequestError",
    ),
    "llm": ("LLM",),
    "manifest": ("Manifest", "load_manifest"),
    "outputs": ("CompletionOutput", "Logprob", "RequestMetrics", "RequestOutput", "StreamPiece"),
    "params": ("SamplingParams",),
    "perplexity": ("Perplexity",),
    "session": ("Session",),
    "speculation": ("Speculation",),
    "structured": ("StructuredOutputsParams",),
    "transcribe": ("Transcript",),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    module = _HOME.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{module}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
