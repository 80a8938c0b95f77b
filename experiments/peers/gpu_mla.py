#!/usr/bin/env python3
"""Times causal attention at 192/128 dimensions through PyTorch (cuDNN's kernels) on a GPU and prints JSON lines.

usage: gpu_mla.py [--lengths T,T,...] [--heads H] [--runs N] [--backward] [--json FILE] [--commit ID]

Batch 1, bfloat16, random data. Rates count 2 (192 + 128) T^2 / 2 operations a head for the forward pass and 2.5 times that for the
backward, as `kl bench mla` does for the attention itself. graph_us: the median replay of a captured graph; the backward is timed by
events around it, o and log-sum-exp being those of a forward pass before.
"""
import argparse
import datetime
import json
import shlex
import statistics
import sys

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

QK, V = 192, 128


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="4096,8192,16384,32768")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--backward", action="store_true")
    parser.add_argument("--json", help="append the lines to this file too")
    parser.add_argument("--commit", help="what to record where there is no git")
    return parser.parse_args()


def median_us(call, runs):
    times = []
    for _ in range(runs + 2):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        stop.record()
        stop.synchronize()
        times.append(1000 * start.elapsed_time(stop))
    return statistics.median(times[2:])


def replay_us(call, runs):
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        call()
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return median_us(graph.replay, runs)


def measure(T, H, args):
    torch.manual_seed(1)
    tensor = lambda width: torch.randn(1, T, H, width, device="cuda", dtype=torch.bfloat16).transpose(1, 2).requires_grad_(args.backward)
    q, k, v = tensor(QK), tensor(QK), tensor(V)
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        attend = lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        flops = 2 * (QK + V) * T * T / 2 * H
        row = {"family": "mla", "variant": "cudnn", "device": torch.cuda.get_device_name(), "torch": torch.__version__, "T": T, "H": H}
        if not args.backward:
            us = replay_us(attend, args.runs)
            yield row | {"pass": "fwd", "graph_us": round(us, 1), "tflops": round(flops / us / 1e6, 1)}
            return
        o = attend()
        d_o = torch.randn_like(o)
        us = median_us(lambda: torch.autograd.grad(o, (q, k, v), d_o, retain_graph=True), args.runs)
        yield row | {"pass": "bwd", "call_us": round(us, 1), "tflops": round(2.5 * flops / us / 1e6, 1)}


def main():
    args = arguments()
    for T in map(int, args.lengths.split(",")):
        for row in measure(T, args.heads, args):
            line = json.dumps(row | {"commit": args.commit, "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
                                     "command": shlex.join(["python3", *sys.argv])})
            print(line, flush=True)
            if args.json:
                with open(args.json, "a") as file:
                    file.write(line + "\n")


if __name__ == "__main__":
    main()
