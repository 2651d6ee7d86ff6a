"""The errors that llmx raises on purpose.

    LlmxError                 everything below; `str(error)` is one sentence that says what to do
    ├── PackageError          a model package is missing, incomplete, altered or too new
    │   └── FamilyError       the package is of a family that this call does not serve
    ├── RequestError          a request that cannot be served as asked (also a ValueError)
    │   └── ContextLengthError  the prompt does not fit the context
    ├── MachineError          this machine lacks something: a provider, a library, memory
    │   ├── MissingDependencyError
    │   ├── ProviderError
    │   └── OutOfMemoryError
    ├── ExportError           a checkpoint cannot be exported
    │   ├── CheckpointError   the source is not a usable checkpoint
    │   ├── UnsupportedModelError  the architecture holds something that llmx does not express yet
    │   └── VerificationError the written graphs disagree with PyTorch
    ├── EngineDeadError       the process that ran the model has ended
    └── ClosedError           the object was closed, or belongs to another process

Anything else that escapes is a bug, and its traceback is wanted.
"""


class LlmxError(Exception):
    """Root of every deliberate error. `exit_code` is what the command line exits with."""

    exit_code = 1


class PackageError(LlmxError):
    """A model package is missing, incomplete, altered or of a newer format."""


class FamilyError(PackageError):
    """The package's family does not fit the call (an encoder asked to generate)."""


class RequestError(LlmxError, ValueError):
    """A parameter or prompt that cannot be served as asked; names the field and its valid range."""

    exit_code = 2


class ContextLengthError(RequestError):
    """The prompt does not fit the context."""


class MachineError(LlmxError):
    """Something that this machine lacks."""


class MissingDependencyError(MachineError):
    """A library is not installed; the message holds the command that installs it."""


class ProviderError(MachineError):
    """An execution provider is not available."""


class OutOfMemoryError(MachineError):
    """The requested state does not fit the free memory; computed before allocating."""


class ExportError(LlmxError):
    """A checkpoint cannot be exported."""


class CheckpointError(ExportError):
    """The source is not there, or is not a usable checkpoint."""


class UnsupportedModelError(ExportError):
    """The model holds something that llmx does not express yet: named, with its place."""


class VerificationError(ExportError):
    """ONNX and PyTorch disagree: the first differing position and the numbers."""


class EngineDeadError(LlmxError):
    """The process that ran the model has ended: killed, out of memory, or by a fault in a driver."""


class ClosedError(LlmxError):
    """The object was closed, or was created in another process (before a fork)."""
