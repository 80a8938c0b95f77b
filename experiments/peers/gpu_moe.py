#!/usr/bin/env python3
"""Times PyTorch's grouped products for a mixture of experts on a GPU and prints JSON lines.

usage: gpu_moe.py [--tokens LIST] [--runs N] [--json FILE] [--commit ID]

256 experts of 2304 -> 2 x 1024 -> 2304, top 8 of random logits, bfloat16: torch._grouped_mm for gate and up together, SwiGLU, torch._grouped_mm
for down. `pass` says what is timed: `products` the grouped products and the SwiGLU on rows that lie sorted already, `layer` the whole layer from
router logits to the weighted sum, as PyTorch operations. graph_us is the median of a graph's replay, call_us of a call between two events.
"""
import argparse
import datetime
import json
import statistics
import sys

D, E, I, TOP_K = 2304, 256, 1024, 8


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="1,8,64,512,2048,8192,32768")
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--json", help="append the lines to this file too")
    parser.add_argument("--commit", help="what to record where there is no git")
    return parser.parse_args()


def times(torch, call, runs):
    """Medians in microseconds: of calls, of a graph's replays (None where it cannot be captured)."""
    def median(run):
        taken = []
        for _ in range(runs):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            run()
            end.record()
            end.synchronize()
            taken.append(1e3 * begin.elapsed_time(end))
        return round(statistics.median(taken), 1)

    for _ in range(3):
        call()
    torch.cuda.synchronize()
    by_call = median(call)
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return by_call, median(graph.replay)
    except RuntimeError:
        return by_call, None


def main():
    options = arguments()
    import torch
    from torch.nn.functional import silu
    torch.manual_seed(1)
    normal = lambda *shape: torch.randn(*shape, device="cuda", dtype=torch.bfloat16)
    gate_up, down, router = normal(E, D, 2 * I) / D ** 0.5, normal(E, I, D) / I ** 0.5, normal(D, E) / D ** 0.5
    for tokens in map(int, options.tokens.split(",")):
        x = normal(tokens, D)

        def route():
            score, chosen = torch.topk(torch.sigmoid(x.float() @ router.float()), TOP_K, dim=-1)
            order = chosen.flatten().argsort(stable=True)
            ends = torch.bincount(chosen.flatten(), minlength=E).cumsum(0, dtype=torch.int32)
            return score / score.sum(-1, keepdim=True), order, ends

        def products(rows, ends):
            h = torch._grouped_mm(rows, gate_up, offs=ends)
            return torch._grouped_mm(silu(h[:, :I]) * h[:, I:], down, offs=ends)

        def layer():
            weight, order, ends = route()
            y = products(x[order // TOP_K], ends)
            y = torch.empty_like(y).index_copy_(0, order, y).view(tokens, TOP_K, D)
            return (y * weight[..., None]).sum(1)

        _, order, ends = route()
        rows, touched = x[order // TOP_K].contiguous(), int((torch.diff(ends, prepend=ends.new_zeros(1)) > 0).sum())
        for name, call in (("products", lambda: products(rows, ends)), ("layer", layer)):
            call_us, graph_us = times(torch, call, options.runs)
            seconds = 1e-6 * (graph_us or call_us)
            line = {"family": "moe", "pass": name, "variant": "torch._grouped_mm", "T": tokens, "D": D, "E": E, "I": I, "top_k": TOP_K, "call_us": call_us,
                    "graph_us": graph_us, "tflops": round(6e-12 * D * I * TOP_K * tokens / seconds, 1), "experts": touched,
                    "weights_gbps": round(6e-9 * D * I * touched / seconds, 1), "device": torch.cuda.get_device_name(), "torch": torch.__version__,
                    "commit": options.commit, "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"), "command": " ".join(sys.argv)}
            for file in filter(None, (sys.stdout, options.json and open(options.json, "a"))):
                print(json.dumps({key: value for key, value in line.items() if value is not None}), file=file, flush=True)


if __name__ == "__main__":
    main()
