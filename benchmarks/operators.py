"""Where a decode step goes: onnxruntime's own profile of each product and operator, two threads, one sequence.

Examples:
    python benchmarks/operators.py --shape smollm2-135m --dtype int4
    python benchmarks/operators.py --shape llama-1b --dtype int4 --prompt 128 --tokens 32

Medians over the steps. Profiling itself adds 2 to 3 µs an operator. Bytes are those of a product's weights as the CPU's kernel
reads them: codes, and 8 bytes a block for its scale and the sum of its codes.
"""

from __future__ import annotations

import json
import random
import statistics
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

from common import add_model_arguments, add_peers_argument, checkpoint_for, machine, make_parser, positive

from common import print_table, write_results  # isort: skip
from peers import model_for, parse_peer


def profiled(package: Path, args: Any, prompt: list[int]) -> list[dict[str, Any]]:
    """onnxruntime's events of the decode graph over one generation."""
    from llmx.runtime import LLM, SamplingParams
    from llmx.runtime.tracing import Trace

    with tempfile.TemporaryDirectory() as folder, Trace(Path(folder)) as trace:
        length = args.prompt + args.tokens + 8
        llm = LLM(package, "cpu", threads=args.threads, max_length=length, slots=1, cache_dir=args.work / "cache")
        params = SamplingParams(max_tokens=args.tokens, temperature=0.0, ignore_eos=True)
        llm.generate([prompt], params)
        files = {graph: file for graph, _, file in trace.end_profiles()}
        events: list[dict[str, Any]] = json.loads(files["decode"].read_text())
    return events


def table(events: list[dict[str, Any]], weight_bytes: dict[str, int]) -> list[list[str]]:
    """A row for each kind of operator (products by their sizes): how many a step, median µs of one, of all, GB/s."""
    times: dict[str, list[float]] = defaultdict(list)
    steps = sum(event["name"] == "model_run" for event in events)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            times[_kind(event["args"])].append(event["dur"])
    rows = []
    for kind, durations in sorted(times.items(), key=lambda item: -sum(item[1])):
        count, middle = len(durations) / steps, statistics.median(durations)
        rate = f"{weight_bytes[kind] / middle / 1e3:.1f}" if kind in weight_bytes else ""
        rows.append([kind, f"{count:.0f}", f"{middle:.0f}", f"{count * middle:,.0f}", rate])
    total = sum(float(row[3].replace(",", "")) for row in rows)
    return [*rows, ["all", "", "", f"{total:,.0f}", ""]]


def _kind(facts: dict[str, Any]) -> str:
    name = str(facts["op_name"])
    if "MatMul" not in name:
        return name
    columns, rows = (next(iter(facts[key][0].values()))[-1] for key in ("input_type_shape", "output_type_shape"))
    return f"{name} {columns} × {rows}"


def products(package: Path) -> dict[str, int]:
    """Bytes of the weights of each kind of product, by the names of `table`."""
    import onnx_ir as ir

    found = {}
    for node in ir.load(package / "decode.onnx").graph:
        if node.op_type == "MatMulNBits":
            columns, rows, bits, block = (node.attributes[key].as_int() for key in ("K", "N", "bits", "block_size"))
            blocks = -(-columns // block)
            found[f"MatMulNBits {columns} × {rows}"] = rows * blocks * (block * bits // 8 + 8)
        elif node.op_type == "FusedMatMul" and node.inputs[1] is not None and node.inputs[1].shape is not None:
            rows, columns = (int(size) for size in node.inputs[1].shape)
            found[f"FusedMatMul {columns} × {rows}"] = rows * columns * 4
    return found


def main() -> None:
    parser = make_parser(__doc__)
    add_model_arguments(parser)
    add_peers_argument(parser)
    parser.add_argument("--prompt", type=positive, default=512, help="tokens of the prompt [default: 512]")
    parser.add_argument("--tokens", type=positive, default=128, help="decode steps [default: 128]")
    parser.add_argument("--threads", type=positive, default=2)
    parser.add_argument("--seed", type=int, default=0, help="of the prompt [default: 0]")
    args = parser.parse_args()
    started, checkpoint = machine(), checkpoint_for(args)
    package = model_for(parse_peer("llmx", args.dtype), checkpoint, args.work, args.peers_dir)
    rng = random.Random(args.seed)
    vocab = json.loads((checkpoint / "config.json").read_text())["vocab_size"]
    prompt = [rng.randrange(1, vocab) for _ in range(args.prompt)]
    rows = table(profiled(package, args, prompt), products(package))
    columns = ["operator", "a step", "µs each", "µs a step", "weights, GB/s"]
    title = f"{checkpoint.name}, {args.dtype}: prompt {args.prompt}, {args.tokens} steps, {args.threads} threads"
    print_table(title, columns, rows)
    tables = [{"title": title, "columns": columns, "rows": rows}]
    shown = {"title": "Operators of a decode step", "section": "CPU", "tables": tables}
    write_results(args.json, f"operators-{checkpoint.name}-{args.dtype}", started, shown)


if __name__ == "__main__":
    main()
