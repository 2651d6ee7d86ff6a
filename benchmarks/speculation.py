"""Speculative decoding beside plain decoding, and beside the speed-up that acceptance and step times predict.

    python benchmarks/speculation.py                                  # the demo pair: held-out text, and text that repeats
    python benchmarks/speculation.py --model DIR --draft DIR --device cuda
    python benchmarks/speculation.py --model DIR --device cuda --num-tokens 4 --acceptance 0.5,0.7,0.9

With `--acceptance` the guesses are the model's own greedy tokens, each replaced by another with a known probability: a draft
of known quality that costs nothing. Prompts are random tokens then.

One request at a time. Plain and speculative runs of a prompt alternate. With each drafter as many guesses are made as pay
(none, where none do), or `--num-tokens`; with a draft, a fixed number as well, whether it pays or not. Each kind of step is
then timed: a decode step and a pass over 2 … k + 1 tokens, each alone; k steps of the draft after a pass, which has just put its own
weights into the caches (and a step of the draft alone, for `predicted_alone` in the JSON); the draft's reading of a prompt, which
it has to read before it can guess; and what plain decoding spends on a token besides its step. From these and the passes that
were counted comes the prediction.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from common import ROOT, machine, make_parser, positive, print_table, rounded, write_results

CHECKPOINTS = ROOT / "artifacts" / "checkpoints"
CONTEXT = 160


def package(name: str, work: Path) -> Path:
    """The demo checkpoint `name` as a package, made once."""
    folder = work / "speculation" / name
    if not (folder / "llmx.json").is_file():
        from llmx.export import ExportOptions, export_model

        export_model(ExportOptions(str(CHECKPOINTS / name), folder))
    return folder


def texts(count: int) -> dict[str, list[str]]:
    """Held-out Shakespeare, and the same repeated: a passage, again, and its first words."""
    whole = (CHECKPOINTS / "data" / "tinyshakespeare.txt").read_text(encoding="utf-8")
    rest = whole[int(len(whole) * 0.9) :]
    step = len(rest) // count
    pieces = [rest[i * step : i * step + 300] for i in range(count)]
    return {"held-out": pieces, "copying": [f"{piece}\n\n{piece}\n\n{piece[:80]}" for piece in pieces]}


def random_prompts(count: int) -> list[list[int]]:
    rng = np.random.default_rng(7)
    return [rng.integers(1, 1000, CONTEXT).tolist() for _ in range(count)]


def seconds(run: Callable[[], Any], repeats: int = 30) -> float:
    for _ in range(3):
        run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


class Known:
    """A drafter that knows what the model will say: each guess is right with a given probability, by its position."""

    steady = True

    def __init__(self, right: float) -> None:
        self.right = right
        self.guesses: dict[tuple[int, ...], list[Any]] = {}  # of each token of the output, by prompt

    def propose(self, wanted: list[tuple[Any, int]]) -> list[list[Any]]:
        proposed = []
        for sequence, most in wanted:
            guesses = self.guesses.get(tuple(sequence.tokens[: sequence.num_prompt]), [])
            proposed.append(guesses[sequence.num_output : sequence.num_output + most])
        return proposed

    def _guesses(self, prompt: list[int], said: list[int]) -> list[Any]:
        from llmx.runtime.speculation import Guess

        right = np.random.default_rng(sum(prompt)).random(len(said)) < self.right
        return [Guess(token if sure else token % 900 + 1) for token, sure in zip(said, right, strict=True)]

    def learn(self, fast: Any, prompts: list[list[int]], params: Any) -> None:
        """Have the model say it. A pass rounds otherwise than a step, so what it says with guesses is what counts; each
        round is right up to the next place where that decides.
        """
        for prompt in prompts:
            before: list[int] = []
            for _ in range(params.max_tokens):
                said = fast.generate([prompt], params)[0].outputs[0].token_ids
                if said == before:
                    break
                before, self.guesses[tuple(prompt)] = said, self._guesses(prompt, said)

    def close(self) -> None:
        pass


def decode_time(llm: Any, prompt: Any, params: Any) -> tuple[float, Any]:
    """(seconds from the first token to the last, the output)."""
    [out] = llm.generate([prompt], params)
    return out.metrics.last_token - out.metrics.first_token, out


class Counted:
    """A speculator's guesses, counted: passes by their number of guesses."""

    def __init__(self, speculator: Any) -> None:
        self.passes: dict[int, int] = {}
        inner = speculator.guess

        def guess(sequences: Any) -> Any:
            found = inner(sequences)
            for guesses in found.values():
                self.passes[len(guesses)] = self.passes.get(len(guesses), 0) + 1
            return found

        speculator.guess = guess


def compare(plain: Any, fast: Any, prompts: list[Any], params: Any, repeats: int, exact: bool = True) -> dict[str, Any]:
    """Both on every prompt, alternating; the median of `repeats` for each. `exact`: greedy outputs must be equal."""
    counted = Counted(fast.engine.speculator)
    slow_time = fast_time = 0.0
    tokens = drafted = accepted = passes = equal = read = lengths = 0
    for prompt in prompts:
        pairs = []
        for _ in range(repeats):
            slow, expected = decode_time(plain, prompt, params)
            quick, out = decode_time(fast, prompt, params)
            same = out.outputs[0].token_ids == expected.outputs[0].token_ids
            assert not exact or params.temperature != 0.0 or same
            equal += same
            pairs.append((slow, quick))
            tokens += out.metrics.num_output_tokens - 1
            drafted += out.metrics.num_drafted
            accepted += out.metrics.num_accepted
            passes += out.metrics.num_verifications
            read += out.metrics.num_drafted > 0
            lengths += out.metrics.num_prompt_tokens
        slow_time += statistics.median(pair[0] for pair in pairs) * repeats
        fast_time += statistics.median(pair[1] for pair in pairs) * repeats
    steps = tokens - accepted - passes  # tokens of plain steps between the passes
    return {
        "tokens": tokens, "plain_seconds": slow_time, "seconds": fast_time, "speedup": slow_time / fast_time,
        "equal_outputs": equal, "outputs": len(prompts) * repeats, "drafted": drafted, "accepted": accepted, "passes": passes, "plain_steps": steps,
        "prompt_tokens": lengths // (len(prompts) * repeats), "prompts_drafted": read,
        "mean_accepted_length": 1 + accepted / max(passes, 1), "passes_by_guesses": dict(sorted(counted.passes.items())),
    }  # fmt: skip


def step_times(plain: Any, fast: Any, per_token: float, widest: int, prompt_tokens: int) -> dict[str, Any]:
    """Seconds of each kind of step at CONTEXT positions, alone, and of reading a prompt by the draft."""
    target = plain.backend
    target.prefill(0, np.full(CONTEXT, 5), 0, np.zeros(0, np.int64))
    one, length = np.array([5]), np.array([CONTEXT])
    chain = [5, CONTEXT]  # a GPU's next step runs ahead, so steps are timed as they follow each other

    def step() -> None:
        made = target.decode(np.array(chain[:1]), np.array(chain[1:]), None, np.zeros(1, np.float32))
        token = made.greedy(0)
        chain[:] = [int(made.row(0).argmax()) if token is None else token, chain[1] + 1]

    decode = seconds(step)
    target = fast.backend
    target.prefill(0, np.full(CONTEXT, 5), 0, np.zeros(0, np.int64))

    def verify(width: int) -> float:
        ids = np.full(width, 5)

        def judged() -> None:
            rows = target.prefill_each(0, ids, CONTEXT, 0.0)
            for index in range(width):
                rows.greedy(index)

        return seconds(judged)

    times: dict[str, Any] = {"decode": decode, "host": max(per_token - decode, 0.0), "draft": 0.0, "draft_prompt": 0.0}
    times["verify"] = {guesses: verify(guesses + 1) for guesses in range(1, widest + 1)}
    draft = getattr(fast.engine.speculator._drafter, "_backend", None)
    if draft is not None:
        draft.prefill(0, np.full(CONTEXT, 5), 0, np.zeros(0, np.int64))
        times["draft"] = seconds(lambda: draft.decode(one, length).rows())
        times["drafts"] = {count: after_a_pass(target, draft, count) for count in range(1, widest + 1)}
        chunk, text = fast.prefill_chunk, np.full(prompt_tokens, 5)

        def read() -> None:
            for start in range(0, len(text), chunk):
                draft.prefill(0, text[start : start + chunk], start, np.zeros(0, np.int64))

        times["draft_prompt"] = seconds(read, 10)
        fast.engine.speculator._drafter._held[0] = []  # what was timed is no sequence's
    return times


def after_a_pass(target: Any, draft: Any, count: int) -> float:
    """Seconds of `count` steps of the draft, each after a pass of the model: as the two alternate."""
    one, times = np.array([5]), []
    for _ in range(30):
        target.prefill_each(0, np.full(count + 1, 5), CONTEXT, 0.0).greedy(count)
        start = time.perf_counter()
        for index in range(count):
            draft.decode(one, np.array([CONTEXT + index])).rows()
        times.append(time.perf_counter() - start)
    return statistics.median(times[3:])


def predict(result: dict[str, Any], times: dict[str, Any], alone: bool = False) -> float:
    """The speed-up that the counted passes give at these step times; `alone`: with the draft's as if nothing ran in between."""
    drafts = times.get("drafts")
    host = result["tokens"] * times["host"]
    plain = result["tokens"] * times["decode"] + host
    passes = sum(
        n * (times["verify"][k] + (k * times["draft"] if alone or drafts is None else drafts[k]))
        for k, n in result["passes_by_guesses"].items()
    )
    prompts = result["prompts_drafted"] * times["draft_prompt"]
    return float(plain / (passes + prompts + result["plain_steps"] * times["decode"] + host))


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--model", type=Path, help="a package [default: the demo, exported]")
    parser.add_argument("--draft", type=Path, help="its draft [default: the demo's]")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--work", type=Path, default=ROOT / "artifacts" / "bench")
    parser.add_argument("--prompts", type=positive, default=12)
    parser.add_argument("--tokens", type=positive, default=96)
    parser.add_argument("--repeats", type=positive, default=3)
    parser.add_argument("--num-tokens", type=positive, help="guesses a pass [default: adapted]")
    parser.add_argument("--acceptance", help="chances that a guess is right, by commas: a drafter of known quality")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--json", type=Path, help="where to write the results [default: benchmarks/results/…]")
    run(parser.parse_args())


def run(args: argparse.Namespace) -> None:
    import onnxruntime
    from llmx.runtime import LLM, SamplingParams, Speculation

    started = machine()
    started["versions"] |= {"onnxruntime": onnxruntime.__version__}  # the GPU's, whatever else is installed
    model = args.model or package("demo", args.work)
    params = SamplingParams(max_tokens=args.tokens, temperature=args.temperature, ignore_eos=True, seed=1)
    if args.acceptance:
        drafters = {
            rate: Speculation(prompt_lookup=True, num_tokens=args.num_tokens) for rate in args.acceptance.split(",")
        }
    else:
        draft, fixed = args.draft or package("draft", args.work), args.num_tokens or 3
        drafters = {
            "draft": Speculation(draft=draft, num_tokens=args.num_tokens),
            f"draft, {fixed} guesses": Speculation(draft=draft, num_tokens=fixed),
            "prompt-lookup": Speculation(prompt_lookup=True, num_tokens=args.num_tokens),
        }
    results, rows = [], []
    settings = {"device": args.device, "slots": 1, "max_length": 1024}
    with LLM(model, **settings) as plain:
        plain.warmup()
        for name, speculative in drafters.items():
            with LLM(model, speculative=speculative, **settings) as fast:
                fast.warmup()
                known = None
                if args.acceptance:
                    known = fast.engine.speculator._drafter = Known(float(name))
                for kind, prompts in ({"": random_prompts(args.prompts)} if known else texts(args.prompts)).items():
                    if known is not None:
                        known.learn(fast, prompts, params)
                    for prompt in prompts[:2]:  # the first passes tell what guesses are worth
                        decode_time(plain, prompt, params), decode_time(fast, prompt, params)
                    exact = not args.device.startswith("cuda")  # there a pass and a step may round apart
                    result = compare(plain, fast, prompts, params, args.repeats, exact)
                    widest = max(result["passes_by_guesses"], default=1)
                    per_token = result["plain_seconds"] / result["tokens"]
                    times = step_times(plain, fast, per_token, widest, result["prompt_tokens"])
                    result["predicted_speedup"] = predict(result, times)
                    result["of_predicted"] = result["speedup"] / result["predicted_speedup"]
                    result["predicted_alone"] = predict(result, times, alone=True)
                    results.append({"drafter": name, "prompts": kind, **result, "step_seconds": times})
                    rows.append([
                        f"guesses right {name} of the time" if known else f"{name}, {kind}",
                        f"{result['mean_accepted_length']:.2f}",
                        f"{result['accepted'] / max(result['drafted'], 1):.0%}", f"{result['speedup']:.2f}",
                        f"{result['predicted_speedup']:.2f}", f"{result['of_predicted']:.0%}",
                    ])  # fmt: skip
                    print(rows[-1], file=sys.stderr)
    columns = ["", "tokens a pass", "accepted", "speed-up", "predicted", "of it"]
    print_table(f"Speculative decoding of {model.name} ({plain.backend.__class__.__name__})", columns, rows)
    for result in results:
        result.update({k: rounded(v) for k, v in result.items() if isinstance(v, float)})
    what = {
        name: getattr(args, name) for name in ("device", "prompts", "tokens", "repeats", "num_tokens", "temperature")
    }
    page = {
        "title": f"Speculative decoding, {model.name}",
        "section": "CUDA" if args.device.startswith("cuda") else "CPU",
        "tables": [{"title": "One request at a time, beside plain decoding", "columns": columns, "rows": rows}],
    }
    name = f"speculation-{model.name}" + ("-cuda" if args.device.startswith("cuda") else "")
    write_results(args.json, name, started, {**page, "settings": what, "results": results})


if __name__ == "__main__":
    main()
