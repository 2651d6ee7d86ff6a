"""A checkpoint as transformers.exporters writes it: prefill and decode graphs, fused for onnxruntime's CPU provider.

Example:
    python benchmarks/exporters_export.py CHECKPOINT OUTPUT
"""

from __future__ import annotations

import sys


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
    sample = {"input_ids": torch.arange(1, 9)[None]}
    exported = OnnxExporter().export_for_generation(model, sample, OnnxConfig(dynamic=True, ort_fusions="cpu"))
    exported.save_pretrained(sys.argv[2])


if __name__ == "__main__":
    main()
