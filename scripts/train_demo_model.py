"""Train the demo model that ships with bitwright: a small Llama on the Python standard library's sources.

    python scripts/train_demo_model.py --work build/demo-model --out src/bitwright/assets/demo-model

Or a model of another size on other text, for benchmarks:

    python scripts/train_demo_model.py --work build/prose --out build/prose/model --text stories.txt --text wiki.txt \\
        --hidden 384 --ffn 768 --layers 4 --heads 6 --kv-heads 2 --steps 600 --no-muon

Such texts are cut into paragraphs at empty lines, of which a hash holds some out: `heldout.txt` in the work folder.

Everything is made here, from nothing: a byte-level BPE tokenizer, then the model, by Muon on the matrices and AdamW on
the rest, with a warm-up, a constant phase and a linear decay (the trapezoid lets a run be shortened or prolonged:
change `--steps` and start again, it resumes from the last checkpoint). A GPU is used where there is one. The model
card (README.md beside the weights) is written from what was measured.
"""

import argparse
import hashlib
import json
import math
import os
import platform
import time
from datetime import date
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from bitwright.data.stdlib import stdlib_documents

VOCABULARY = 2048
CONTEXT = 512
BATCH = 8
WARM_UP_STEPS = 100
DECAY_FRACTION = 0.35
MATRIX_LR, OTHER_LR = 0.02, 0.003
CHECKPOINT_EVERY = 200
HELD_OUT_PERCENT = 6
PARAGRAPH_CHARACTERS = 400


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", model_max_length=CONTEXT
    )


def tokenise(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    return torch.cat([torch.tensor(ids, dtype=torch.int32) for ids in tokenizer(texts, verbose=False)["input_ids"]])


def split_text(files: list[Path]) -> tuple[list[str], list[str]]:
    """Pieces of some paragraphs each: those to train on, and those whose hash holds them out."""
    train: list[str] = []
    heldout: list[str] = []
    for file in files:
        piece = ""
        for paragraph in file.read_text(encoding="utf-8").split("\n\n"):
            piece += paragraph + "\n\n"
            if len(piece) >= PARAGRAPH_CHARACTERS:
                bucket = hashlib.sha256(piece.encode()).digest()[0] * 100 // 256
                (heldout if bucket < HELD_OUT_PERCENT else train).append(piece)
                piece = ""
    return train, heldout


def make_model(args: argparse.Namespace) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=args.hidden,
        intermediate_size=args.ffn,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config)


def make_optimizers(model: LlamaForCausalLM, *, muon: bool) -> list[torch.optim.Optimizer]:
    if not muon:
        return [torch.optim.AdamW(model.parameters(), lr=OTHER_LR, betas=(0.9, 0.95), weight_decay=0.0)]
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(matrices, lr=MATRIX_LR, weight_decay=0.1, adjust_lr_fn="original"),
        torch.optim.AdamW(others, lr=OTHER_LR, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def rate(step: int, steps: int) -> float:
    """The trapezoid: fraction of the peak learning rate at `step`."""
    return min(1.0, (step + 1) / WARM_UP_STEPS, (steps - step) / (DECAY_FRACTION * steps))


def batch_at(tokens: torch.Tensor, step: int) -> torch.Tensor:
    """The step's windows, without replacement inside an epoch; a function of the step alone, so that a run resumes."""
    windows = (len(tokens) - 1) // CONTEXT
    per_epoch = windows // BATCH
    epoch, index = divmod(step, per_epoch)
    order = torch.randperm(windows, generator=torch.Generator().manual_seed(epoch))
    offset = int(torch.randint(CONTEXT, (1,), generator=torch.Generator().manual_seed(1000 + epoch)))
    starts = order[index * BATCH : (index + 1) * BATCH] * CONTEXT + offset
    starts = starts.clamp(max=len(tokens) - CONTEXT - 1)
    return torch.stack([tokens[s : s + CONTEXT + 1] for s in starts.tolist()]).long()


@torch.no_grad()
def mean_nll(model: LlamaForCausalLM, tokens: torch.Tensor, max_windows: int | None = None) -> float:
    """Mean negative log-likelihood in nats over non-overlapping windows of CONTEXT tokens."""
    device = next(model.parameters()).device
    windows = tokens[: len(tokens) // CONTEXT * CONTEXT].view(-1, CONTEXT)[:max_windows].long()
    losses = [model(input_ids=w.to(device), labels=w.to(device)).loss.item() for w in windows.split(8)]
    weights = [len(w) for w in windows.split(8)]
    return sum(loss * n for loss, n in zip(losses, weights, strict=True)) / sum(weights)


def unigram_nll(train: torch.Tensor, heldout: torch.Tensor) -> float:
    counts = torch.bincount(train, minlength=VOCABULARY).double() + 1
    return -(counts / counts.sum()).log()[heldout.long()].mean().item()


STDLIB = "the source files of CPython {}'s standard library"
CARD = """---
license: apache-2.0
library_name: transformers
---
# bitwright {title}

A {parameters:,}-parameter Llama ({layers} blocks, hidden {hidden}, FFN {ffn}, {heads} heads over {kv_heads} key/value
heads, tied embeddings, byte-level BPE vocabulary of {vocabulary}), made to show what quantization does to a trained
model. It continues such text badly and is good for nothing else.

- **Made by** `scripts/train_demo_model.py` of this repository; tokenizer and weights both, from nothing.
- **Trained on** {text} ({train_tokens:,} tokens; a split by hash is
  held out), {epochs:.1f} epochs, {steps} steps of {batch} × {context} tokens.
- **For** {hours:.2f} hours on {machine}, ended {date}.
- **Perplexity per token** on what is held out ({heldout_tokens:,} tokens, windows of {context}, bf16 weights):
  **{perplexity:.2f}**; a unigram model of the training text has {unigram:.0f}, a uniform one {vocabulary}.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="checkpoints and tokens; delete to start over")
    parser.add_argument("--out", type=Path, required=True, help="where the finished model goes")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument(
        "--muon", action=argparse.BooleanOptionalAction, default=True, help="or AdamW for all: cheaper steps"
    )
    parser.add_argument("--text", type=Path, action="append", help="train on these files instead; may be repeated")
    for option, default in (("hidden", 256), ("ffn", 768), ("layers", 4), ("heads", 4), ("kv-heads", 2)):
        parser.add_argument(f"--{option}", type=int, default=default)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    if args.text:
        train_texts, heldout_texts = split_text(args.text)
        tokenizer_texts = train_texts
        (args.work / "heldout.txt").write_text("\n\n".join(heldout_texts))
        (args.work / "train.txt").write_text("\n\n".join(train_texts))
    else:
        train_texts = [text for _, text in stdlib_documents("train", with_tests=True)]
        heldout_texts = [text for _, text in stdlib_documents("heldout")]
        tokenizer_texts = [text for _, text in stdlib_documents("train")]
    if (args.work / "tokenizer.json").exists():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(args.work)
    else:
        tokenizer = train_tokenizer(tokenizer_texts)
        tokenizer.save_pretrained(args.work)
    train, heldout = tokenise(tokenizer, train_texts), tokenise(tokenizer, heldout_texts)
    print(f"{len(train):,} training tokens, {len(heldout):,} held out, on {device}", flush=True)

    torch.manual_seed(0)
    model = make_model(args).to(device)
    optimizers = make_optimizers(model, muon=args.muon)
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    first, seconds_before = 0, 0.0
    checkpoint = args.work / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True, map_location=device)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        first, seconds_before = state["step"], state["seconds"]

    compiled = torch.compile(model)
    start = time.perf_counter()
    for step in range(first, args.steps):
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * rate(step, args.steps)
        tokens = batch_at(train, step).to(device)
        with torch.autocast(device, dtype=torch.bfloat16):
            logits = compiled(input_ids=tokens[:, :-1]).logits
        loss = functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        done = step + 1
        if done % 50 == 0:
            seconds = time.perf_counter() - start
            pace = (done - first) * BATCH * CONTEXT / seconds
            left = (args.steps - done) * BATCH * CONTEXT / pace / 60
            print(
                f"step {done}/{args.steps}  loss {loss.item():.3f}  {pace:,.0f} tokens/s  {left:.0f} min left",
                flush=True,
            )
        if done % CHECKPOINT_EVERY == 0 or done == args.steps:
            seconds = seconds_before + time.perf_counter() - start
            state = {
                "model": model.state_dict(),
                "optimizers": [o.state_dict() for o in optimizers],
                "step": done,
                "seconds": seconds,
            }
            torch.save(state, checkpoint.with_suffix(".tmp"))
            checkpoint.with_suffix(".tmp").replace(checkpoint)
            print(f"step {done}  held-out perplexity {math.exp(mean_nll(model, heldout, 64)):.2f}", flush=True)

    hours = (seconds_before + time.perf_counter() - start) / 3600
    model.to(torch.bfloat16).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    perplexity = math.exp(mean_nll(model.float(), heldout))
    config = model.config
    card = CARD.format(
        parameters=model.num_parameters(), layers=config.num_hidden_layers, hidden=config.hidden_size,
        ffn=config.intermediate_size, heads=config.num_attention_heads, kv_heads=config.num_key_value_heads,
        vocabulary=VOCABULARY, title="benchmark model" if args.text else "demo model",
        text=", ".join(file.name for file in args.text) if args.text else STDLIB.format(platform.python_version()),
        train_tokens=len(train), heldout_tokens=len(heldout),
        epochs=args.steps * BATCH * CONTEXT / len(train), steps=args.steps, batch=BATCH, context=CONTEXT, hours=hours,
        machine=f"{os.cpu_count()} CPU cores" if device == "cpu" else torch.cuda.get_device_name(),
        date=date.today().isoformat(), perplexity=perplexity, unigram=math.exp(unigram_nll(train, heldout)),
    )  # fmt: skip
    (args.out / "README.md").write_text(card)
    print(json.dumps({"perplexity": perplexity, "hours": hours}))


if __name__ == "__main__":
    main()
