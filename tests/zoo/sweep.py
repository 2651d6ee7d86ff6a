"""The coverage sweep: every causal-LM, masked-LM and sequence-to-sequence type of transformers, small, exported and compared with PyTorch.

    python tests/zoo/sweep.py                 # what has no result yet; then docs/coverage.md
    python tests/zoo/sweep.py --again llama   # these types once more
    python tests/zoo/sweep.py --report        # only write the page

Each type runs in a process of its own with a time and a memory limit; results are kept under build/coverage.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))
RESULTS = ROOT / "build" / "coverage"
PAGE = ROOT / "docs" / "coverage.md"
NEW_TOKENS = 48
MASKED = " (masked LM)"
SEQ2SEQ = " (seq2seq)"
TIME_LIMIT = 300  # seconds of CPU time; a busy machine gives a type six times as long
ADDRESS_LIMIT = 30 << 30  # of virtual memory, bytes


def causal_types() -> list[str]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def masked_types() -> list[str]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    return sorted(f"{name}{MASKED}" for name in MODEL_FOR_MASKED_LM_MAPPING_NAMES)


def seq2seq_types() -> list[str]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES

    return sorted(f"{name}{SEQ2SEQ}" for name in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES)


def examine_seq2seq(model_type: str, folder: Path) -> dict[str, Any]:
    """As `examine`: three ragged sources, alone and in one batch."""
    import torch
    from llmx.export.verify_seq2seq import greedy
    from transformers import AutoModelForSeq2SeqLM

    from zoo.models import widen
    from zoo.shrink import VOCAB, shrink

    torch.set_num_threads(1)
    pad, start = 1, 2  # apart, as in real checkpoints: some models count positions by what is no padding
    sources = [torch.randint(3, VOCAB, (1, n), generator=torch.Generator().manual_seed(n)) for n in (7, 61, 23)]
    try:
        config = shrink(model_type.removesuffix(SEQ2SEQ), decoder=False)
        if not config.is_encoder_decoder:  # a decoder that hears: its text tower
            return examine(model_type.removesuffix(SEQ2SEQ), folder, AutoModelForSeq2SeqLM)
        if model_type.startswith("prophetnet"):
            pad = 0  # its positions must begin at 1
        config.pad_token_id, config.decoder_start_token_id = pad, start
        torch.manual_seed(0)
        model = AutoModelForSeq2SeqLM.from_config(config).eval()
        widen(model, 0)
        for name in ("forced_bos_token_id", "forced_eos_token_id", "bad_words_ids", "suppress_tokens"):
            setattr(model.generation_config, name, None)
        model.save_pretrained(folder / "model")  # what is not stored (sinusoids) is not what `widen` made of it
        model = AutoModelForSeq2SeqLM.from_pretrained(folder / "model").eval()
        model.generation_config.pad_token_id, model.generation_config.decoder_start_token_id = pad, start
        expected = [greedy(model, s, [start], NEW_TOKENS)[0, 1:].tolist() for s in sources]
    except Exception as error:
        return {"result": "pytorch", "reason": _line(error)}
    entry, made = _export(model, folder, "auto")
    if made is None:
        return entry
    return _compare(entry, made, [s[0].tolist() for s in sources], expected)


def _export(model: Any, folder: Path, task: str) -> tuple[dict[str, Any], Any]:
    """(what is known of `model`, its ExportResult), or with the refusal and None."""
    from llmx.export import ExportOptions, export_model
    from llmx.runtime.errors import ExportError, LlmxError, VerificationError

    from zoo.models import save_checkpoint

    entry: dict[str, Any] = {
        "architecture": type(model).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    save_checkpoint(model, folder / "checkpoint")
    options = ExportOptions(str(folder / "checkpoint"), folder / "package", task=task)
    try:
        try:
            return entry, export_model(options)
        except ExportError as error:
            if "give --max-length" not in str(error):
                raise
            return entry, export_model(replace(options, max_length=512))
    except VerificationError as error:
        reason, result = f"verification: {_line(error)}", "refused"
    except LlmxError as error:
        reason, result = _line(error), "refused"
    except Exception as error:
        reason, result = f"{type(error).__name__}: {_line(error)}", "crashed"
    return {**entry, "result": result, "reason": reason}, None


def examine_masked(model_type: str, folder: Path) -> dict[str, Any]:
    """An encoder with its masked-LM head: "exact" where a padded batch's logits equal PyTorch's rows within 1e-4."""
    import torch
    from transformers import AutoModelForMaskedLM

    from zoo.models import widen
    from zoo.shrink import VOCAB, shrink

    torch.set_num_threads(1)
    try:
        config = shrink(model_type.removesuffix(MASKED), decoder=False)
        torch.manual_seed(0)
        model = AutoModelForMaskedLM.from_config(config).eval()
        widen(model, 0)
        with torch.no_grad():
            model(input_ids=torch.randint(1, VOCAB, (1, 61)), attention_mask=torch.ones(1, 61, dtype=torch.long))
    except Exception as error:
        return {"result": "pytorch", "reason": _line(error)}
    entry, made = _export(model, folder, "fill-mask")
    if made is None:
        return entry
    return {**entry, "result": "exact", "reason": "", "max_abs_diff": made.manifest.verification.max_abs_diff}


def examine(model_type: str, folder: Path, auto_class: Any = None) -> dict[str, Any]:
    """result: "exact", "refused" (with the reason), "wrong", or "pytorch" (PyTorch itself does not run it small)."""
    import torch
    from llmx.export.verify import greedy
    from transformers import AutoModelForCausalLM

    from zoo.models import widen
    from zoo.shrink import VOCAB, shrink

    torch.set_num_threads(1)
    lengths = (7, 61, 23)
    prompts = [torch.randint(1, VOCAB, (1, n), generator=torch.Generator().manual_seed(n)) for n in lengths]
    try:
        config = shrink(model_type)
        torch.manual_seed(0)
        model = (auto_class or AutoModelForCausalLM).from_config(config).eval()
        widen(model, 0)
        model.generation_config.eos_token_id = None
        expected = [greedy(model, p, NEW_TOKENS)[0, p.shape[1] :].tolist() for p in prompts]
    except Exception as error:
        return {"result": "pytorch", "reason": _line(error)}
    entry, made = _export(model, folder, "auto")
    if made is None:
        return entry
    return _compare(entry, made, [p[0].tolist() for p in prompts], expected)


def _compare(entry: dict[str, Any], made: Any, ids: list[list[int]], expected: list[list[int]]) -> dict[str, Any]:
    """`entry` with what the package makes of the prompts, each alone and all in one batch."""
    from llmx.runtime import LLM, SamplingParams

    params = SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True).resolved({})  # whatever the type's defaults are
    with LLM(made.path, slots=3, prefill_chunk=16, threads=1) as llm:
        layouts = sorted({t.layout for t in llm.manifest.state})
        single = [llm.generate(p, params)[0].outputs[0].token_ids for p in ids]
        batch = [o.outputs[0].token_ids for o in llm.generate(ids, params)]
    same = single == expected and batch == expected
    entry |= {"layouts": layouts, "max_abs_diff": llm.manifest.verification.max_abs_diff}
    return {
        **entry,
        "result": "exact" if same else "wrong",
        "reason": "" if same else _difference(expected, single, batch),
    }


def _difference(expected: list[list[int]], single: list[list[int]], batch: list[list[int]]) -> str:
    for name, got in (("alone", single), ("in a batch", batch)):
        for row, (want, have) in enumerate(zip(expected, got, strict=True)):
            if want != have:
                at = next(i for i in range(NEW_TOKENS) if want[i] != have[i])
                return f"row {row} {name}: token {at} is {have[at]}, PyTorch's {want[at]}"
    return ""


def _line(error: BaseException) -> str:
    text = (
        re.sub(r"\S*/sweep-\S*?/(?:\.package\S*?/)?", "the ", " ".join(str(error).split()).replace(str(ROOT), ""))
        .replace("|", "/")
        .replace("<", "‹")
        .replace(">", "›")
    )
    return (text or type(error).__name__)[:600]


def _child(model_type: str) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_LIMIT, ADDRESS_LIMIT))
    resource.setrlimit(resource.RLIMIT_CPU, (TIME_LIMIT, TIME_LIMIT))
    with open(os.devnull, "w") as null:
        os.dup2(null.fileno(), 1)
        os.dup2(null.fileno(), 2)
    folder = Path(tempfile.mkdtemp(prefix=f"sweep-{_plain(model_type)}-"))
    started = time.time()
    try:
        kinds = {MASKED: examine_masked, SEQ2SEQ: examine_seq2seq}
        kind = next((run for suffix, run in kinds.items() if model_type.endswith(suffix)), examine)
        entry = kind(model_type, folder)
    except BaseException as error:
        entry = {"result": "crashed", "reason": f"{type(error).__name__}: {_line(error)}"}
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    _store(model_type, {**entry, "seconds": round(time.time() - started, 1)})


def _store(model_type: str, entry: dict[str, Any]) -> None:
    entry = {"type": model_type, **entry, "transformers": importlib.metadata.version("transformers")}
    partial = RESULTS / f".{model_type}.partial"
    partial.write_text(json.dumps(entry, indent=1))
    partial.rename(RESULTS / f"{model_type}.json")


def sweep(types: list[str], jobs: int) -> None:
    """Run `types`, `jobs` at a time, in forks of a process that has imported everything once."""
    os.environ.update(HF_HUB_OFFLINE="1", LLMX_CACHE=tempfile.mkdtemp(prefix="sweep-cache-"), OMP_NUM_THREADS="1")
    import torch

    torch.set_num_threads(1)
    import llmx.export
    import llmx.export.export  # noqa: F401  (imported once, for all forks)
    import onnxruntime  # noqa: F401

    fork = multiprocessing.get_context("fork")
    waiting, running, done = list(types), {}, 0
    while waiting or running:
        while waiting and len(running) < jobs:
            name = waiting.pop(0)
            process = fork.Process(target=_child, args=(name,))
            process.start()
            running[name] = (process, time.time())
        for name, (process, started) in list(running.items()):
            late = time.time() - started > 6 * TIME_LIMIT
            if late:
                process.kill()
            process.join(0.05)
            if process.is_alive():
                continue
            late = late or process.exitcode in (-signal.SIGXCPU, -signal.SIGKILL)
            if late or process.exitcode:
                reason = f"longer than {TIME_LIMIT} s" if late else f"the process died ({process.exitcode})"
                _store(name, {"result": "crashed", "reason": reason})
            done += 1
            entry = json.loads((RESULTS / f"{name}.json").read_text())
            print(f"{done}/{len(types)} {name}: {entry['result']} {entry.get('reason', '')[:150]}", flush=True)
            del running[name]
    shutil.rmtree(os.environ["LLMX_CACHE"], ignore_errors=True)


_WORDS = {
    "exact": "exact",
    "refused": "refused",
    "pytorch": "not run by PyTorch at small size",
    "wrong": "WRONG",
    "crashed": "crashed",
}


def report() -> None:
    """docs/coverage.md from the stored results."""
    lines = [
        "# Coverage",
        "",
        f"Every causal-LM, masked-LM and sequence-to-sequence type of transformers {importlib.metadata.version('transformers')}, as a small random "
        "model, exported and run beside PyTorch (`make coverage`). *Refused*: the export says why, and leaves no package. CI "
        "compares one model of each family and layout of state, and each kind of hyper-parameter (`make coverage-subset`, 8.5 "
        "minutes on two cores).",
    ]
    lines += _section(
        "Causal language models",
        "*Exact*: 48 greedy tokens equal transformers' `generate`, for three ragged prompts (7, 61 and 23 tokens, longer "
        "than every sliding window) alone and in one batch.",
        causal_types(),
    )
    lines += _section(
        "Encoders (masked language models)",
        "*Exact*: the logits of three rows (4, 23 and 61 tokens) in one padded batch equal PyTorch's of each row alone within "
        "1e-4 of the largest logit.",
        masked_types(),
    )
    lines += _section(
        "Encoder-decoders (sequence to sequence)",
        "*Exact*: 48 greedy tokens equal transformers' `generate`, for three ragged sources (7, 61 and 23 tokens) alone and "
        "in one batch.",
        seq2seq_types(),
    )
    PAGE.write_text("\n".join(lines) + "\n")


def _entries(title: str, types: list[str]) -> list[dict[str, Any]]:
    """Stored results; for types without one, what the page says."""
    words = {word: result for result, word in _WORDS.items()}
    section = PAGE.read_text().partition(f"## {title}\n")[2].partition("\n## ")[0] if PAGE.is_file() else ""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines()]
    known = {row[0]: row for row in rows if len(row) == 4 and row[2] in words}
    entries = []
    for name in types:
        stored, row = RESULTS / f"{name}.json", known.get(_plain(name))
        if stored.is_file():
            entries.append(json.loads(stored.read_text()))
        elif row is not None:
            layouts = [part for part in row[1].split(", ") if part]
            entries.append({"type": name, "layouts": layouts, "result": words[row[2]], "reason": row[3]})
    return entries


def _plain(name: str) -> str:
    return name.removesuffix(MASKED).removesuffix(SEQ2SEQ)


def _section(title: str, meaning: str, types: list[str]) -> list[str]:
    entries = _entries(title, types)
    counts = Counter(e["result"] for e in entries)
    total = (
        ", ".join(f"{counts[k]} {w}" for k, w in _WORDS.items() if counts[k])
        + f"; {len(entries)} of {len(types)} types."
    )
    print(f"{title}: {total}")
    rows = [
        f"| {_plain(e['type'])} | {', '.join(e.get('layouts', []))} | {_WORDS[e['result']]} | {e.get('reason', '')} |"
        for e in entries
    ]
    return [
        "",
        f"## {title}",
        "",
        meaning,
        "",
        total,
        "",
        "| type | state | result | reason |",
        "|---|---|---|---|",
        *rows,
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--again", nargs="*", default=None, help="types to run once more (all, where none is named)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--report", action="store_true", help="only write the page")
    args = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    if not args.report:
        types = [*causal_types(), *masked_types(), *seq2seq_types()]
        if args.again is not None:
            types = args.again or types
        else:
            types = [t for t in types if not (RESULTS / f"{t}.json").is_file()]
        sweep(types, args.jobs)
    report()


if __name__ == "__main__":
    main()
