"""What a decode step spends outside onnxruntime's run call: greedy, a vocabulary of 128k, batch 1 and 32.

Examples:
    python benchmarks/host.py                                       # the 135M shape with Llama 3's vocabulary
    python benchmarks/host.py --dtype int4 --batch-size 1,8,32

Measured by `llmx bench`; the bounds are 3 % of the step at batch 1 and 10 % at batch 32.
"""

from __future__ import annotations

import json
import subprocess
import sys

from common import (
    add_model_arguments,
    add_peers_argument,
    checkpoint_for,
    fail,
    machine,
    make_parser,
    positive,
    print_table,
    short_error,
    spread,
    summary,
    write_results,
)
from peers import model_for, parse_peer

BOUNDS = {1: 0.03, 32: 0.10}


def main() -> None:
    parser = make_parser(__doc__)
    add_model_arguments(parser)
    add_peers_argument(parser)
    parser.set_defaults(shape="smollm2-135m-128k")
    parser.add_argument("--batch-size", default="1,32", help="requests at once, by commas [default: 1,32]")
    parser.add_argument("--prompt", type=positive, default=64, help="tokens of the prompt [default: 64]")
    parser.add_argument("--tokens", type=positive, default=64, help="decode steps [default: 64]")
    parser.add_argument("--repeats", type=positive, default=3, help="runs that count [default: 3]")
    args = parser.parse_args()
    started = machine()
    package = model_for(parse_peer("llmx", args.dtype), checkpoint_for(args), args.work, args.peers_dir)
    command = [sys.executable, "-m", "llmx.cli", "bench", "--onnx", str(package), "-p", str(args.prompt)]
    command += ["-n", str(args.tokens), "-r", str(args.repeats), "--batch-size", args.batch_size]
    done = subprocess.run([*command, "--cold-starts", "0", "--json"], capture_output=True, text=True, check=False)
    if done.returncode:
        fail(f"llmx bench failed: {short_error(done.stderr)}")
    report = json.loads(done.stdout)
    batches, rows = {}, []
    for p in report["points"]:
        step = [host / share for host, share in zip(p["host_s"]["values"], p["host_share"]["values"], strict=True)]
        batches[str(p["batch"])] = {
            "step_ms": summary([s * 1e3 for s in step]),
            "host_us": summary([h * 1e6 for h in p["host_s"]["values"]]),
            "host_share": summary(p["host_share"]["values"]),
        }
        facts = batches[str(p["batch"])]
        share, bound = facts["host_share"]["median"], BOUNDS.get(p["batch"])
        verdict = "" if bound is None else ("yes" if share <= bound else "NO") + f" (≤ {bound:.0%})"
        cells = [spread(facts["step_ms"], 2), spread(facts["host_us"], 0), f"{share:.2%}", verdict]
        rows.append([str(p["batch"]), *cells])
    vocab = report["package"]["vocab_size"]
    columns = ["batch", "step, ms", "outside the run call, µs", "share", "within"]
    print_table(f"{package.name}, vocabulary {vocab:,}, greedy", columns, rows)
    name = package.name.split("-llmx-")[0]
    settings = {"model": name, "dtype": args.dtype, "vocab_size": vocab, "prompt": args.prompt, "tokens": args.tokens}
    write_results(args.json, f"host-{name}-{args.dtype}", started, {"settings": settings, "batches": batches})


if __name__ == "__main__":
    main()
