"""Make the embedded model ``fedtune:tiny``: its tokenizer, its weights and its card.

The text is the public half of the standard library, never the half the clients
of a federation hold. ``--export-data`` writes that half to one file, and
``--data`` trains from such a file, so a machine with a GPU needs only torch,
transformers, tokenizers and safetensors, and can run this file on its own::

    python -m fedtune.simulations.pretrain_tiny --export-data public.jsonl
    python pretrain_tiny.py --data public.jsonl --device cuda --out tiny
"""

import argparse
import copy
import hashlib
import json
import math
import platform
import random
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn import functional

MAX_PARAMETERS, MAX_BYTES = 3_000_000, 6_000_000
EOS, PAD = "<|endoftext|>", "<|pad|>"
HELDOUT_SHARE = 0.05
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


class Corpus(NamedTuple):
    """The public texts, split by file, and the figures of them."""

    train: list[str]
    heldout: list[str]
    figures: dict[str, Any]


def digest(text: str) -> str:
    """SHA-256 of a text, by which the two halves are compared."""
    return hashlib.sha256(text.encode()).hexdigest()


def check_limit(name: str, value: int, limit: int) -> None:
    """Refuse a model that is too large to be embedded in a package."""
    if value > limit:
        raise SystemExit(f"{name} is {value}, over the limit {limit}: lower --hidden or --layers")


def build_rows(seed: int) -> list[dict[str, Any]]:
    """Rows of the public half with their split, behind one row on their origin."""
    from fedtune.data import stdlib

    public, private = stdlib.read_half(stdlib.PUBLIC), stdlib.read_half(stdlib.PRIVATE)
    modules = sorted({row["module"] for row in public})
    n_heldout = max(1, round(HELDOUT_SHARE * len(modules)))
    heldout = set(random.Random(seed).sample(modules, n_heldout))
    private_digests = sorted({digest(row["text"]) for row in private})
    meta = {"python": platform.python_version(), "private_sha256": private_digests}
    return [{"split": "meta", **meta}] + [
        {"split": "heldout" if row["module"] in heldout else "train", **row} for row in public
    ]


def to_corpus(rows: list[dict[str, Any]]) -> Corpus:
    """Split rows into a corpus, refusing any text of the private half."""
    if not rows or rows[0]["split"] != "meta" or len({row["split"] for row in rows}) != 3:
        raise SystemExit("the data lacks a meta, train or heldout row: write it by --export-data")
    private = set(rows[0]["private_sha256"])
    leaked = sorted({row["module"] for row in rows[1:] if digest(row["text"]) in private})
    if leaked:
        raise SystemExit(f"texts of the private half in {leaked}: remove them from PUBLIC")
    figures = {"python": rows[0]["python"]}
    texts: dict[str, list[str]] = {}
    for part in ("train", "heldout"):
        chosen = [row for row in rows if row["split"] == part]
        texts[part] = [row["text"] for row in chosen]
        figures[f"{part}_files"] = len({row["module"] for row in chosen})
        figures[f"{part}_bytes"] = sum(len(text.encode()) for text in texts[part])
        figures[f"{part}_sha256"] = digest("".join(map(digest, texts[part])))
    return Corpus(**texts, figures=figures)


def load_corpus(args: argparse.Namespace) -> Corpus:
    """The corpus of ``--data``, or of this Python; written to ``--export-data`` if asked."""
    if args.data:
        rows = [json.loads(line) for line in args.data.read_bytes().splitlines()]
    else:
        rows = build_rows(args.seed)
    corpus = to_corpus(rows)
    if args.export_data:
        args.export_data.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        print(f"wrote {len(rows)} rows to {args.export_data}")
    return corpus


def train_tokenizer(texts: list[str], vocab: int) -> Any:
    """A byte-level BPE tokenizer, so any text survives encoding and decoding."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=[EOS, PAD], initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(texts, trainer)
    wrap: Any = PreTrainedTokenizerFast  # its constructor has no types
    names = {"bos_token": EOS, "eos_token": EOS, "pad_token": PAD}
    # The clean-up would eat spaces before punctuation.
    return wrap(tokenizer_object=core, clean_up_tokenization_spaces=False, **names)


def encode(tokenizer: Any, texts: list[str]) -> torch.Tensor:
    """All texts as one stream of tokens, with an end-of-text token around each."""
    end = tokenizer.eos_token_id
    found = tokenizer.backend_tokenizer.encode_batch(texts)
    return torch.tensor([end, *(token for text in found for token in (*text.ids, end))])


def build_model(args: argparse.Namespace, tokenizer: Any) -> Any:
    """A Llama decoder with fresh weights, within the limit on parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden,
        intermediate_size=args.hidden * 8 // 3,
        num_hidden_layers=args.layers,
        num_attention_heads=max(1, args.hidden // 32),
        num_key_value_heads=max(1, args.hidden // 96),
        head_dim=32,
        max_position_embeddings=2 * args.context,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(args.seed)
    model = LlamaForCausalLM(config)
    check_limit("the number of parameters", model.num_parameters(), MAX_PARAMETERS)
    return model


def batches(ids: torch.Tensor, context: int, size: int, seed: int) -> Iterator[torch.Tensor]:
    """Endless batches of blocks of ``context + 1`` tokens, each token at most once per epoch."""
    generator = torch.Generator().manual_seed(seed)
    span = torch.arange(context + 1, device=ids.device)
    if len(ids) <= 2 * context:
        raise SystemExit(f"{len(ids)} training tokens are too few: lower --context {context}")
    while True:
        # A new offset per epoch: blocks cut elsewhere are a mild augmentation.
        offset = int(torch.randint(context, (1,), generator=generator))
        n_blocks = (len(ids) - 1 - offset) // context
        order = (torch.randperm(n_blocks, generator=generator) * context + offset).to(ids.device)
        for first in range(0, max(1, n_blocks - size + 1), size):
            yield ids[order[first : first + size, None] + span]


def token_loss(model: Any, block: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
    """Next-token cross-entropy in nats over blocks; a label of -100 is left out."""
    logits = model(input_ids=block[:, :-1].clamp(min=0)).logits.float().flatten(0, 1)
    return functional.cross_entropy(logits, block[:, 1:].flatten(), reduction=reduction)


@torch.no_grad()
def heldout_loss(model: Any, heldout: torch.Tensor, context: int) -> float:
    """Mean loss per held-out token, in float32, over blocks side by side."""
    n_tokens = len(heldout) - 1
    n_blocks = math.ceil(n_tokens / context)
    padded = functional.pad(heldout, (0, n_blocks * context - n_tokens), value=-100)
    parts = torch.split(padded.unfold(0, context + 1, context), 32)
    return math.fsum(token_loss(model, part, "sum").item() for part in parts) / n_tokens


def make_optimizer(model: Any, args: argparse.Namespace) -> tuple[Any, Any]:
    """AdamW that decays matrices but not norms, and warm-up into a cosine down to a tenth."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    gains = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": gains, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95))
    warm, turn = max(1, args.warmup), math.pi / args.steps
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, 0.55 + 0.45 * math.cos(turn * step))
    )
    return optimizer, schedule


def train(model: Any, ids: torch.Tensor, heldout: torch.Tensor, args: argparse.Namespace) -> Any:
    """Train in place, leave the best weights in ``model``, and return the figures."""
    optimizer, schedule = make_optimizer(model, args)
    data = batches(ids, args.context, args.batch, args.seed)
    history: list[dict[str, Any]] = []
    best: dict[str, Any] = {"heldout_loss": math.inf, "step": 0}
    best_state: dict[str, torch.Tensor] = {}
    started, seen = time.perf_counter(), 0
    for step in range(1, args.steps + 1):
        block = next(data)
        with torch.autocast(ids.device.type, torch.bfloat16):
            loss = token_loss(model, block)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        seen += block[:, 1:].numel()
        if step % args.eval_every and step != args.steps:
            continue
        seconds = time.perf_counter() - started
        history.append({"step": step, "tokens": seen, "seconds": round(seconds, 1)})
        history[-1] |= {"tokens_per_second": round(seen / seconds), "train_loss": loss.item()}
        history[-1]["heldout_loss"] = heldout_loss(model, heldout, args.context)
        print(*(f"{key} {value:.6g}" for key, value in history[-1].items()), flush=True)
        if history[-1]["heldout_loss"] < best["heldout_loss"]:
            best, best_state = history[-1], copy.deepcopy(model.state_dict())
        elif step - best["step"] >= args.patience * args.eval_every:
            break
    if not best_state:
        raise SystemExit(f"held-out loss was never finite with --lr {args.lr}: lower it")
    model.load_state_dict(best_state)
    return {"best": best, "last": history[-1], "history": history}


def choose_dtype(model: Any, heldout: torch.Tensor, context: int) -> tuple[str, dict[str, float]]:
    """The 16-bit type whose rounding costs least held-out loss, and both losses."""
    losses = {}
    for name, dtype in DTYPES.items():
        losses[name] = heldout_loss(copy.deepcopy(model).to(dtype).float(), heldout, context)
    return min(losses, key=lambda name: losses[name]), losses


CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---
# fedtune:tiny

A Llama decoder of {parameters:,} parameters with a byte-level BPE tokenizer of {vocab} tokens,
the base model of fedtune's examples and tests. Trained from scratch on the public half of the
Python {python} standard library: {train_files} files, {train_bytes:,} bytes, {train_tokens:,}
tokens. No text of the private half, which the clients of `fedtune:stdlib` hold, was used.

| | |
|---|---|
| layers, hidden size, tokens in training | {layers}, {hidden}, {context} |
| weights | {dtype}, {model_bytes:,} bytes, tied embeddings |
| training | {last[step]:,} steps, best at step {best[step]:,}; {last[seconds]} s on {device_name} |
| tokens seen | {best[tokens]:,} up to the best step, {last[tokens]:,} in all |
| held-out loss | {loss_per_token:.4f} nats per token, {loss_per_byte:.4f} per byte |

The loss is of the weights as stored, on {heldout_files} files of the public half held out whole
({heldout_tokens:,} tokens, {heldout_bytes:,} bytes), in blocks of {context} tokens. The same
files chose the best step, so it is slightly optimistic. Made with torch {torch}, transformers
{transformers} and tokenizers {tokenizers} by:

    python -m fedtune.simulations.pretrain_tiny --out DIR {command}

Limits: it continues Python source and docstrings for a line or two, knows nothing else, and can
repeat its training text. Licences: weights and tokenizer, Apache-2.0; the training text, not part
of this folder, is Copyright Python Software Foundation, PSF License Agreement.
"""


def save(model: Any, tokenizer: Any, dtype: str, folder: Path) -> int:
    """Write model and tokenizer, and return the size of the weights, within the limit."""
    copy.deepcopy(model).cpu().to(DTYPES[dtype]).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    n_bytes = (folder / "model.safetensors").stat().st_size
    check_limit("the size of model.safetensors in bytes", n_bytes, MAX_BYTES)
    return n_bytes


def stored_loss(folder: Path, texts: list[str], args: argparse.Namespace) -> float:
    """Held-out loss of what was written, loaded the way a user loads it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    for text in texts:
        if tokenizer.decode(tokenizer(text)["input_ids"]) != text:
            raise SystemExit(f"the saved tokenizer does not give {text[:60]!r} back: check save()")
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    heldout = encode(tokenizer, texts).to(args.device)
    return heldout_loss(model.to(args.device).eval(), heldout, args.context)


def run(args: argparse.Namespace, corpus: Corpus) -> None:
    """Train on the corpus and put the finished folder at ``--out``."""
    import tokenizers
    import transformers

    tokenizer = train_tokenizer(corpus.train, args.vocab)
    model = build_model(args, tokenizer).to(args.device)
    ids, heldout = (encode(tokenizer, part).to(args.device) for part in corpus[:2])
    print(f"{model.num_parameters()} parameters, {len(ids)} training tokens", flush=True)
    options = {key: getattr(args, key) for key in OPTIONS}
    figures = {**options, **corpus.figures, **train(model, ids, heldout, args)}
    dtype, figures["heldout_loss_rounded"] = choose_dtype(model, heldout, args.context)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        figures |= {
            "model_bytes": save(model, tokenizer, dtype, folder),
            "loss_per_token": (loss := stored_loss(folder, corpus.heldout, args)),
            "train_tokens": len(ids),
            "heldout_tokens": len(heldout),
            "parameters": model.num_parameters(),
            "dtype": dtype,
            "loss_per_byte": loss * (len(heldout) - 1) / corpus.figures["heldout_bytes"],
            "device_name": torch.cuda.get_device_name() if "cuda" in args.device else "CPU",
            **{lib.__name__: lib.__version__ for lib in (torch, transformers, tokenizers)},
            "command": " ".join(f"--{k.replace('_', '-')} {v}" for k, v in options.items()),
        }
        (folder / "training.json").write_text(json.dumps(figures, indent=2) + "\n", "utf-8")
        (folder / "README.md").write_text(CARD.format(**figures), "utf-8")
        args.out.mkdir(parents=True, exist_ok=True)
        for path in folder.iterdir():  # file by file: the temporary folder is private
            shutil.copyfile(path, args.out / path.name)
    print(f"wrote {args.out}: {dtype}, held-out loss {loss:.4f} nats per token")


OPTIONS = {"steps": 6000, "batch": 32, "context": 256, "lr": 2e-3, "warmup": 200, "seed": 0}
OPTIONS |= {"eval_every": 100, "patience": 8, "vocab": 2048, "hidden": 192, "layers": 6}


def main(argv: list[str] | None = None) -> None:
    """Read the command line, then export, train, or both."""
    parser = argparse.ArgumentParser(description="Make fedtune:tiny.")
    parser.add_argument("--out", type=Path, help="folder to write the model to")
    parser.add_argument("--data", type=Path, help="train from this exported file")
    parser.add_argument("--export-data", type=Path, help="write the texts to this file")
    parser.add_argument("--device", default="cpu")
    for name, value in OPTIONS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    args = parser.parse_args(argv)
    if not (args.out or args.export_data):
        parser.error("nothing to do: give --out DIR, --export-data FILE, or both")
    corpus = load_corpus(args)
    if args.out:
        run(args, corpus)


if __name__ == "__main__":
    main()
