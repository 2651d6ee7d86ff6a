"""Train the demo models on tinyshakespeare: a tokenizer, a 2.2M-parameter Llama and a small draft for it.

    python artifacts/checkpoints/train.py --size demo --output artifacts/checkpoints/demo
    python artifacts/checkpoints/train.py --size draft --output artifacts/checkpoints/draft

The last tenth of the text is held out: it is never trained on and decides which weights are kept. The rest is cut into
documents of a few speeches, each ended by the end token, so that the model learns to stop.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import sys
import time
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
TEXT = HERE / "data" / "tinyshakespeare.txt"
END = "<|endoftext|>"
VOCAB = 1024
HELD_OUT = 0.1
SPEECHES = (6, 14)  # speeches of one document
CONTEXT = 1024
WINDOW = 256  # tokens of a training row
SIZES: dict[str, dict[str, int]] = {
    "demo": {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 5, "num_attention_heads": 6, "num_key_value_heads": 2},
    "draft": {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 3, "num_key_value_heads": 1},
}  # fmt: skip
TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}
{{ message['content'] | trim }}

{% elif message['role'] == 'user' -%}
FIRST CITIZEN:
{{ message['content'] | trim }}

{% elif message['role'] == 'assistant' -%}
SECOND CITIZEN:
{{ message['content'] | trim }}

{% else -%}
{{ raise_exception('Roles are system, user and assistant, not ' + message['role'] + '.') }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
SECOND CITIZEN:
{% endif -%}
"""


def split_text(text: str) -> tuple[str, str]:
    """(training text, held-out text), cut between two speeches."""
    cut = text.rfind("\n\n", 0, int(len(text) * (1 - HELD_OUT))) + 2
    return text[:cut], text[cut:]


def train_tokenizer(text: str) -> Any:
    """A byte-level BPE of VOCAB tokens; id 0 is END. Trained on the training text alone."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([text], trainer)
    return tokenizer


def documents(text: str, rng: random.Random) -> list[str]:
    """The text as consecutive runs of speeches."""
    speeches, result = text.split("\n\n"), []
    at = 0
    while at < len(speeches):
        count = rng.randint(*SPEECHES)
        result.append("\n\n".join(speeches[at : at + count]) + "\n\n")
        at += count
    return result


def encode(tokenizer: Any, text: str, rng: random.Random) -> torch.Tensor:
    """int64 [tokens] of the whole text, documents ended by END (id 0)."""
    ids: list[int] = []
    for encoding in tokenizer.encode_batch(documents(text, rng)):
        ids += [*encoding.ids, 0]
    return torch.tensor(ids)


def build(size: str) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB, max_position_embeddings=CONTEXT, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0,
        pad_token_id=0, rms_norm_eps=1e-5, attn_implementation="sdpa", **SIZES[size],
    )  # fmt: skip
    return LlamaForCausalLM(config)


def add_dropout(model: Any, rate: float) -> None:
    """Dropout after the embedding and each attention and MLP, which Llama's config has no setting for."""

    def drop(module: Any, _: Any, output: Any) -> Any:
        if not module.training:
            return output
        if isinstance(output, tuple):
            return (torch.nn.functional.dropout(output[0], rate), *output[1:])
        return torch.nn.functional.dropout(output, rate)

    model.model.embed_tokens.register_forward_hook(drop)
    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(drop)
        layer.mlp.register_forward_hook(drop)


@torch.no_grad()
def held_out_loss(model: Any, ids: torch.Tensor, device: str) -> float:
    """Mean negative log-likelihood, nats a token, over non-overlapping windows of the held-out text."""
    model.eval()
    rows = (len(ids) - 1) // WINDOW
    x = ids[: rows * WINDOW].view(rows, WINDOW).to(device)
    y = ids[1 : rows * WINDOW + 1].view(rows, WINDOW).to(device)
    total = 0.0
    for start in range(0, rows, 32):
        logits = model(input_ids=x[start : start + 32], use_cache=False).logits.float()
        total += float(
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), y[start : start + 32].flatten(), reduction="sum")
        )
    model.train()
    return total / (rows * WINDOW)


def train(
    args: argparse.Namespace, model: Any, train_ids: torch.Tensor, val_ids: torch.Tensor
) -> tuple[Any, list[dict[str, float]]]:
    """AdamW with a cosine schedule; returns the weights with the lowest held-out loss, and the curve."""
    device = args.device
    model.to(device).train()
    add_dropout(model, args.dropout)
    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}],
        lr=args.lr,
        betas=(0.9, 0.95),
        fused=device == "cuda",
    )
    data = train_ids.to(device)
    generator = torch.Generator().manual_seed(args.seed)
    offsets = torch.arange(WINDOW + 1, device=device)
    best, best_loss, curve = None, math.inf, []  # type: Any, float, list[dict[str, float]]
    started, running = time.time(), 0.0
    for step in range(1, args.steps + 1):
        scale = min(1.0, step / 200) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / args.steps)))
        for group in optimizer.param_groups:
            group["lr"] = args.lr * scale
        starts = torch.randint(0, len(train_ids) - WINDOW - 1, (args.batch,), generator=generator).to(device)
        rows = data[starts[:, None] + offsets]
        with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
            logits = model(input_ids=rows[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % args.every == 0 or step == args.steps:
            running, val = float(loss.detach()), held_out_loss(model, val_ids, device)
            curve.append({"step": step, "train": round(running, 4), "held_out": round(val, 4)})
            print(
                f"step {step}/{args.steps}  train {running:.3f}  held-out {val:.3f}  {time.time() - started:.0f} s",
                flush=True,
            )
            if val < best_loss:
                best_loss, best = val, copy.deepcopy(model.state_dict())
    model.load_state_dict(best)
    return model.eval(), curve


def save(model: Any, tokenizer: Any, output: Path) -> None:
    """Hugging Face format, fp16 weights."""
    from transformers import GenerationConfig

    output.mkdir(parents=True, exist_ok=True)
    model = copy.deepcopy(model).to("cpu", torch.float16)
    model.config.dtype = torch.float16
    model.generation_config = GenerationConfig(
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        do_sample=True,
        temperature=0.8,
        top_p=0.95,
        top_k=50,
        max_new_tokens=256,
    )
    model.save_pretrained(output)
    tokenizer.save(str(output / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END,
        "eos_token": END,
        "pad_token": END,
        "model_max_length": CONTEXT,
        "clean_up_tokenization_spaces": False,
    }
    (output / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (output / "chat_template.jinja").write_text(TEMPLATE)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="demo")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--dropout", type=float, default=0.2)
    parser.add_argument("--every", type=int, default=250, help="steps between two looks at the held-out text")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    args = parser.parse_args()
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch sees no CUDA device; use --device cpu")
    if not TEXT.is_file():
        parser.error(f"{TEXT} is missing; restore it from the repository")
    return args


def main() -> None:
    args = parse()
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    train_text, val_text = split_text(TEXT.read_text(encoding="utf-8"))
    tokenizer = train_tokenizer(train_text)
    train_ids, val_ids = encode(tokenizer, train_text, rng), encode(tokenizer, val_text, rng)
    model = build(args.size)
    count = sum(p.numel() for p in model.parameters())
    print(
        f"{args.size}: {count:,} parameters, {len(train_ids):,} training tokens, {len(val_ids):,} held out", flush=True
    )
    started = time.time()
    model, curve = train(args, model, train_ids, val_ids)
    save(model, tokenizer, args.output)
    rounded = build(args.size)
    rounded.load_state_dict({k: v.half().float().cpu() for k, v in model.state_dict().items()})
    loss = held_out_loss(rounded, val_ids, "cpu")
    characters = len(val_text) / len(val_ids)
    summary = {
        "size": args.size, "parameters": count, "steps": args.steps, "batch": args.batch, "seconds": round(time.time() - started, 1),
        "held_out_nats_per_token": round(loss, 4), "held_out_bits_per_character": round(loss / math.log(2) / characters, 4),
        "held_out_perplexity": round(math.exp(loss), 2), "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu", "curve": curve,
    }  # fmt: skip
    (args.output / "training.json").write_text(json.dumps(summary, indent=1) + "\n")
    print({k: v for k, v in summary.items() if k != "curve"}, flush=True)


if __name__ == "__main__":
    sys.exit(main())
