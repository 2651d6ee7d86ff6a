"""What a grammar costs a token: structured outputs beside plain sampling of the same model, in the same process.

Examples:
    python benchmarks/structured.py --tekken tekken_240911.json
    python benchmarks/structured.py --shape llama-1b --tekken tekken_240911.json --tokens 60

A grammar's masks depend on real tokens, so the checkpoint's vocabulary is Mistral's "tekken" (its JSON file is in the
`mistral-common` wheel, under mistral_common/data), cut to the shape's vocabulary. Weights are random: what is sampled at
temperature 1 is near to any token, inside the grammar.

For each form, plain and structured runs alternate; both report log-probabilities, so that no forced tokens are run in a
chunk and every token has its step. `grammar` is the time spent in llguidance and in applying the mask, a token. The last
column is the speed as users have it, with forced tokens in chunks. Of each kind the fastest run counts, the one that other
work on the machine disturbed least; the grammar's time is the median.
"""

from __future__ import annotations

import argparse
import base64
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from checkpoints import SHAPES, write_checkpoint
from common import (
    add_model_arguments,
    add_peers_argument,
    fail,
    machine,
    make_parser,
    positive,
    print_table,
    summary,
    write_results,
)
from peers import model_for, parse_peer

BOUND = 0.05
_PERSON = {
    "type": "object",
    "properties": {
        "first_name": {"type": "string", "maxLength": 30},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "role": {"enum": ["administrator", "editor", "reader"]},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 12}, "maxItems": 3},
    },
    "required": ["first_name", "age", "role", "tags"],
    "additionalProperties": False,
}
FORMS: dict[str, dict[str, Any]] = {
    "JSON schema, nested": {"json": {"type": "array", "items": _PERSON, "minItems": 500}},
    "JSON schema, strings": {"json": {"type": "array", "items": {"type": "string", "maxLength": 60}, "minItems": 500}},
    "regex": {"regex": "([a-z]{3,9}(, |; )){2000,}"},
    "Lark grammar": {
        "grammar": 'start: sum "=" NUMBER\nsum: term (("+" | "-") term){900,}\nterm: NUMBER | NAME | "(" sum ")"\n'
        "NUMBER: /[0-9]{1,9}/\nNAME: /[a-z_]{1,12}/\n"
    },
}


class Clock:
    """Seconds inside the wrapped functions, the outermost alone."""

    def __init__(self) -> None:
        self.seconds, self._depth = 0.0, 0

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            self._depth += 1
            start = time.perf_counter()
            try:
                return function(*args)
            finally:
                self._depth -= 1
                if not self._depth:
                    self.seconds += time.perf_counter() - start

        return timed


def write_tokenizer(folder: Path, tekken: Path, vocab: int) -> None:
    """A byte-level BPE of the first tokens of `tekken`; its end token is 0, as the shapes' configs have it."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    facts = json.loads(tekken.read_text(encoding="utf-8"))
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}
    ids = {"<|endoftext|>": 0}
    merges: list[tuple[str, str]] = []
    ranks: dict[bytes, int] = {}
    for entry in facts["vocab"][: vocab - 1]:
        token = base64.b64decode(entry["token_bytes"])
        ranks[token] = entry["rank"]
        ids["".join(letters[byte] for byte in token)] = entry["rank"] + 1
    for token in ranks:
        pairs = [(token[:at], token[at:]) for at in range(1, len(token))]
        known = [(left, right) for left, right in pairs if left in ranks and right in ranks]
        for left, right in sorted(known, key=lambda pair: (ranks[pair[0]], ranks[pair[1]])):
            spelled = ["".join(letters[byte] for byte in part) for part in (left, right)]
            merges.append((spelled[0], spelled[1]))
    tokenizer = Tokenizer(models.BPE(ids, merges, ignore_merges=True))
    split = pre_tokenizers.Split(Regex(facts["config"]["pattern"]), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)


def measure(llm: Any, form: dict[str, Any], args: argparse.Namespace, clock: Clock) -> dict[str, Any]:
    """Seconds a token, plain and structured in turn; of the structured runs, those spent in the grammar."""
    from llmx.runtime import SamplingParams

    wanted = {**form, "disable_any_whitespace": True}
    plain: list[float] = []
    structured: list[float] = []
    grammar: list[float] = []
    chunked: list[float] = []
    prompt = list(range(1000, 1032))

    def run(**more: Any) -> tuple[float, int]:
        params = SamplingParams(max_tokens=args.tokens, temperature=1.0, ignore_eos=True, **more)
        metrics = llm.generate([prompt], params)[0].metrics
        if metrics.num_output_tokens <= args.tokens // 2:
            fail(f"an output of {metrics.num_output_tokens} tokens ended before it could be measured.")
        return metrics.last_token - metrics.first_token, metrics.num_output_tokens - 1

    run(seed=0, structured_outputs=wanted)  # the grammar is compiled, its masks are warm
    for repeat in range(args.repeats):
        seconds, count = run(seed=repeat, logprobs=0)
        plain.append(seconds / count)
        clock.seconds = 0.0
        seconds, count = run(seed=repeat, logprobs=0, structured_outputs=wanted)
        structured.append(seconds / count)
        grammar.append(clock.seconds / (count + 1))
        seconds, count = run(seed=repeat, structured_outputs=wanted)
        chunked.append(seconds / count)
    base = min(plain)
    return {
        "plain_s": summary(plain),
        "structured_s": summary(structured),
        "grammar_s": summary(grammar),
        "chunked_s": summary(chunked),
        "overhead": min(structured) / base - 1,
        "grammar_share": statistics.median(grammar) / base,
        "chunked_speedup": base / min(chunked),
    }


def main() -> None:
    parser = make_parser(__doc__)
    add_model_arguments(parser)
    add_peers_argument(parser)
    parser.set_defaults(shape="smollm2-135m-128k")
    parser.add_argument("--tekken", type=Path, required=True, help="tekken_*.json of the mistral-common wheel")
    parser.add_argument("--tokens", type=positive, default=80, help="tokens of an output [default: 80]")
    parser.add_argument("--repeats", type=positive, default=3, help="runs of each kind [default: 3]")
    args = parser.parse_args()
    if not args.tekken.is_file():
        fail(f"{args.tekken} does not exist; it is in the mistral-common wheel, under mistral_common/data.")
    if args.checkpoint is not None or args.shape not in SHAPES:
        fail(f"--shape must be one of {', '.join(SHAPES)}.")
    vocab = SHAPES[args.shape]["vocab_size"]
    checkpoint = args.work.resolve() / f"{args.shape}-tekken"  # not the other benchmarks' checkpoint
    if not checkpoint.is_dir():
        write_checkpoint(args.shape, checkpoint)
        write_tokenizer(checkpoint, args.tekken, vocab)
    package = model_for(parse_peer("llmx", args.dtype), checkpoint, args.work, args.peers_dir)
    from llmx.runtime import LLM, grammar, sampling

    clock = Clock()
    sampling.allowed = clock.around(sampling.allowed)
    for name in ("follow", "forced"):
        setattr(grammar.Grammar, name, clock.around(getattr(grammar.Grammar, name)))
    started, results = machine(), {}
    with LLM(package, "cpu", max_length=512, slots=1) as llm:
        llm.warmup()
        begin = time.perf_counter()
        llm.engine.grammars.compile(sampling_form("a"))
        vocabulary = time.perf_counter() - begin
        for name, form in FORMS.items():
            results[name] = measure(llm, form, args, clock)
    rows = [
        [
            name,
            f"{r['plain_s']['min'] * 1e3:.2f}",
            f"{r['structured_s']['min'] * 1e3:.2f}",
            f"{r['overhead']:+.1%}",
            f"{r['grammar_s']['median'] * 1e3:.3f}",
            f"{r['grammar_share']:.1%}",
            f"{r['chunked_speedup']:.2f}",
        ]
        for name, r in results.items()
    ]
    columns = ["form", "plain, ms/token", "structured", "overhead", "grammar, ms", "of a token", "speed with chunks"]
    title = f"Structured outputs: {package.name}, {vocab:,} tokens"
    print_table(title, columns, rows)
    tables = [{"title": "temperature 1, one row", "columns": columns, "rows": rows}]
    shown = {"title": title, "section": "CPU", "tables": tables}
    settings = {"model": package.name, "vocab": vocab, "tokens": args.tokens, "vocabulary_s": vocabulary}
    write_results(args.json, f"structured-{package.name}", started, {**shown, "settings": settings, "forms": results})
    sys.exit(0 if all(r["grammar_share"] <= BOUND and r["overhead"] <= BOUND for r in results.values()) else 1)


def sampling_form(pattern: str) -> Any:
    from llmx.runtime import StructuredOutputsParams

    return StructuredOutputsParams(regex=pattern)


if __name__ == "__main__":
    main()
