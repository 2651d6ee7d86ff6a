"""llmx.runtime: a model package in, tokens out, on numpy, onnxruntime and tokenizers alone.

from llmx.runtime import LLM, SamplingParams

llm = LLM("artifacts/demo")
[out] = llm.generate(["ROMEO:"], SamplingParams(max_tokens=64))
print(out.outputs[0].text)
"""

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
