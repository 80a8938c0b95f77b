#!/usr/bin/env python3
"""Runs transformers' kimi_linear over given ids and saves what it computes, in float32.

usage: model_oracle.py DIR IDS OUT.safetensors [--grad] [--greedy N]

DIR is a checkpoint. IDS is a text file of token ids, one sequence a line, all of one length,
or a safetensors file that holds input_ids [B,T]. OUT gets
  input_ids [B,T], logits [B,T,vocab], hidden.0 (embeddings) ... hidden.L (after the final norm),
  loss [1] (mean next-token cross-entropy);
with --grad, grad.NAME for every parameter by its run-time name;
with --greedy N, greedy_ids [1,20+N] and greedy_gap [N]: the first row's first 20 ids (fewer if it is
shorter) continued greedily without a cache, and the margin of each choice; greedy_ids_cached with one.
These are the names that `kl verify model` reads when OUT is DIR/expected.safetensors.
One JSON line says what was run.
"""
import argparse
import json
import os

os.environ["HF_HUB_OFFLINE"] = "1"
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import KimiLinearForCausalLM

GREEDY_PROMPT = 20


def read_ids(path, vocab):
    if path.endswith(".safetensors"):
        ids = load_file(path)["input_ids"].long()
    else:
        with open(path) as f:
            rows = [[int(word) for word in line.replace(",", " ").split()] for line in f if line.strip()]
        if len({len(row) for row in rows}) != 1:
            raise SystemExit(f"{path}: expected sequences of one length, got {sorted({len(r) for r in rows})}")
        ids = torch.tensor(rows)
    if ids.min() < 0 or ids.max() >= vocab:
        raise SystemExit(f"{path}: expected ids below {vocab}, got {ids.min()} to {ids.max()}")
    return ids


def forward(model, ids, with_grad):
    with torch.set_grad_enabled(with_grad):
        out = model(input_ids=ids, use_cache=False, output_hidden_states=True)
        # The mean over all pairs: transformers' own labels= would give the same, but ignores some ids.
        loss = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    tensors = {"input_ids": ids, "logits": out.logits, "loss": loss.reshape(1)}
    tensors |= {f"hidden.{i}": h for i, h in enumerate(out.hidden_states)}
    if with_grad:
        loss.backward()
        tensors |= {f"grad.{n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    return tensors


@torch.inference_mode()
def greedy(model, ids, steps, cached):
    """Ids and margins: with the cache one token a step, without it the whole sequence each time."""
    tokens, gaps = ids[:1, :GREEDY_PROMPT], []
    fed, cache = tokens, None
    for _ in range(steps):
        out = model(input_ids=fed, past_key_values=cache, use_cache=cached)
        best = out.logits[0, -1].topk(2)
        gaps.append(best.values[0] - best.values[1])
        chosen = best.indices[:1].reshape(1, 1)
        tokens = torch.cat([tokens, chosen], dim=1)
        fed, cache = (chosen, out.past_key_values) if cached else (tokens, None)
    return tokens, torch.stack(gaps)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dir")
    parser.add_argument("ids")
    parser.add_argument("out")
    parser.add_argument("--grad", action="store_true")
    parser.add_argument("--greedy", type=int, default=0, metavar="N")
    args = parser.parse_args()

    model = KimiLinearForCausalLM.from_pretrained(args.dir, dtype=torch.float32, attn_implementation="eager").eval()
    ids = read_ids(args.ids, model.config.vocab_size)
    tensors = forward(model, ids, args.grad)
    if args.greedy:
        tensors["greedy_ids"], tensors["greedy_gap"] = greedy(model, ids, args.greedy, cached=False)
        tensors["greedy_ids_cached"], _ = greedy(model, ids, args.greedy, cached=True)
    save_file({name: t.detach().contiguous().clone() for name, t in tensors.items()}, args.out)
    print(json.dumps({
        "dir": args.dir, "out": args.out, "B": ids.shape[0], "T": ids.shape[1], "tensors": len(tensors),
        "loss": tensors["loss"].item(), "logits_rms": tensors["logits"].square().mean().sqrt().item(),
        "transformers": transformers.__version__, "torch": torch.__version__,
    }))


if __name__ == "__main__":
    main()
