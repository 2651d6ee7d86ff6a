"""`weights.data`: offsets, hash, unused parameters, errors of the thread."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from llmx.export.weights import SourceModel
from llmx.export.writer import ALIGNMENT, WeightsWriter
from llmx.runtime.errors import ExportError


class Two(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = torch.nn.Parameter(torch.randn(64, 33))
        self.b = torch.nn.Parameter(torch.randn(100, 50))
        self.small = torch.nn.Parameter(torch.randn(3))


def ignore(done: int, total: int) -> None:
    pass


@pytest.mark.parametrize("used", [{"a", "b"}, {"b"}, {"a"}, set()])
def test_used_parameters_and_further_tensors(used: set[str], tmp_path: Path) -> None:
    module, path = Two(), tmp_path / "weights.data"
    table = np.arange(2000, dtype=np.int64)
    with WeightsWriter(path, SourceModel(module, {})) as writer:
        spans = writer.finish(used, {"table": table.tobytes}, ignore)
    data = path.read_bytes()
    for name in used:
        offset, length = spans[name]
        assert offset % ALIGNMENT == 0
        expected = getattr(module, name).detach().numpy()
        np.testing.assert_array_equal(np.frombuffer(data[offset : offset + length], np.float32), expected.reshape(-1))
    assert set(spans) == used | {"table"}
    assert data[spans["table"][0] :] == table.tobytes()
    assert writer.size == len(data) and writer.sha256 == hashlib.sha256(data).hexdigest()
    assert len(data) <= sum(-(-length // ALIGNMENT) * ALIGNMENT for _, length in spans.values())


def test_thread_errors_reach_the_caller(tmp_path: Path) -> None:
    class Overflowing(SourceModel):
        def chunks(self, name, tensor):  # type: ignore[no-untyped-def]
            raise ExportError("a weight overflows")

    with WeightsWriter(tmp_path / "w", Overflowing(Two(), {})) as writer, pytest.raises(ExportError, match="overflows"):
        writer.finish({"a"}, {}, ignore)


def test_leaving_early_stops_the_thread(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), WeightsWriter(tmp_path / "w", SourceModel(Two(), {})) as writer:
        raise KeyboardInterrupt
    writer._thread.join(1)
    assert not writer._thread.is_alive()
