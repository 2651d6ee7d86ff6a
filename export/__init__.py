"""llmx.export: a Hugging Face checkpoint in, a model package out. The only part of llmx that imports PyTorch.

from llmx.export import ExportOptions, export_model

result = export_model(ExportOptions("artifacts/checkpoints/demo"))
"""

from llmx.export.export import export_model
from llmx.export.work import ExportOptions, ExportResult, Reporter

__all__ = ["ExportOptions", "ExportResult", "Reporter", "export_model"]
