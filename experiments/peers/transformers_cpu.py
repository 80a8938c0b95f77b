#!/usr/bin/env python3
"""Times transformers' kimi_linear on the CPU in float32 and prints JSON lines.

usage: transformers_cpu.py DIR [--threads 2] [--prompt 2048] [--contexts 256,2048]
                           [--tokens 64] [--runs 5] [--experts NAME] [--json FILE]

Prefill is one call of the model over the whole prompt with an empty cache: logits "all" is the
plain call, which computes them at every position; "last" is what generate() asks for. Decode is
greedy, one call of the model a token on the cache that a prefill left; call_us is the time of
one token. Each figure is the median, with the least and the greatest. One line a case.
"""
import argparse
import datetime
import json
import os
import shlex
import statistics
import subprocess
import sys
import time


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dir", help="checkpoint: config.json and model.safetensors")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=2048, help="tokens of the timed prefill")
    parser.add_argument("--contexts", default="256,2048", help="prompt lengths to decode after")
    parser.add_argument("--tokens", type=int, default=64, help="tokens decoded after each prompt")
    parser.add_argument("--runs", type=int, default=5, help="timed prefills, after one to warm up")
    parser.add_argument("--decode-runs", type=int, default=3, help="timed decodes, after one to warm up")
    parser.add_argument("--experts", help="transformers' experts implementation (default: its own choice)")
    parser.add_argument("--json", help="append the lines to this file too")
    return parser.parse_args()


args = arguments()
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(args.threads)
os.environ["HF_HUB_OFFLINE"] = "1"
import torch  # noqa: E402: reads the thread count when it is loaded
import transformers  # noqa: E402
from transformers import KimiLinearForCausalLM  # noqa: E402


def git(*words):
    where = os.path.dirname(os.path.abspath(__file__))
    done = subprocess.run(["git", "-C", where, *words], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def processor():
    with open("/proc/cpuinfo") as f:
        names = [line.split(":", 1)[1].strip() for line in f if line.startswith("model name")]
    return names[0] if names else "unknown"


def provenance(model):
    return {
        "device": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "dtype": "float32",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": sys.version.split()[0],
        "attention": model.config._attn_implementation,
        "experts": model.config._experts_implementation,
        "load": [round(x, 2) for x in os.getloadavg()],
        "commit": git("rev-parse", "--short", "HEAD"),
        "dirty": bool(git("status", "--porcelain")),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python3", *sys.argv]),
    }


def shape(model):
    c = model.config
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "L": c.num_hidden_layers, "D": c.hidden_size,
        "H": c.linear_num_heads, "K": c.linear_head_dim, "V": c.linear_head_dim,
        "E": c.num_local_experts, "top_k": c.num_experts_per_tok, "vocab": c.vocab_size,
    }


def row(model, times, tokens, **case):
    us = [1e6 * t for t in times]
    median = statistics.median(us)
    line = {
        "family": "model", "variant": "transformers", "B": 1, **case,
        "call_us": round(median, 1), "min_us": round(min(us), 1), "max_us": round(max(us), 1), "runs": len(us),
        "tokens_per_s": round(1e6 * tokens / median, 2),
        **shape(model), **provenance(model),
    }
    text = json.dumps(line)
    print(text, flush=True)
    if args.json:
        with open(args.json, "a") as f:
            f.write(text + "\n")


def prompt(model, length):
    """Random ids, the same in every run; id 0 is padding and stays out."""
    generator = torch.Generator().manual_seed(7)
    return torch.randint(1, model.config.vocab_size, (1, length), generator=generator)


def timed(call):
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def prefill_times(model, ids, runs, **options):
    call = lambda: model(input_ids=ids, use_cache=True, **options)
    call()
    return [timed(call)[0] for _ in range(runs)]


def decode_times(model, ids, tokens):
    """Seconds for each of `tokens` greedy steps after the prompt `ids`."""
    out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
    times = []
    for _ in range(tokens):
        def step(out=out):
            chosen = out.logits[:, -1].argmax(-1, keepdim=True)
            return model(input_ids=chosen, past_key_values=out.past_key_values, use_cache=True)
        seconds, out = timed(step)
        times.append(seconds)
    return times


def main():
    torch.set_num_threads(args.threads)
    torch.set_num_interop_threads(1)
    options = {"experts_implementation": args.experts} if args.experts else {}
    model = KimiLinearForCausalLM.from_pretrained(args.dir, dtype=torch.float32, **options).eval()
    with torch.inference_mode():
        ids = prompt(model, args.prompt)
        row(model, prefill_times(model, ids, args.runs), args.prompt,
            **{"pass": "prefill"}, T=args.prompt, context=args.prompt, logits="all")
        row(model, prefill_times(model, ids, args.runs, logits_to_keep=1), args.prompt,
            **{"pass": "prefill"}, T=args.prompt, context=args.prompt, logits="last")
        for context in map(int, args.contexts.split(",")):
            ids = prompt(model, context)
            decode_times(model, ids, 8)
            times = [t for _ in range(args.decode_runs) for t in decode_times(model, ids, args.tokens)]
            row(model, times, 1, **{"pass": "decode"}, T=1, context=context, logits="all")


if __name__ == "__main__":
    main()
