#!/usr/bin/env python3
"""Times flash-linear-attention's KDA (and its general DPLR) on a GPU and prints JSON lines.

usage: gpu_kda.py [--cases LIST] [--tuners N] [--runs N] [--json FILE] [--commit ID]

A case is OPERATOR:T=...,H=...[,N=...], OPERATOR one of
  fwd     chunk_kda, log gates in [-5, 0), initial state in, final state out
  fwdbwd  chunk_kda with the gate (softplus), the norms and the sigmoid inside, forward and backward of everything
  decode  fused_recurrent_kda, one token of N sequences, states in and out
  dplr    chunk_dplr_delta_rule, forward, as fwd
K = V = 128, bfloat16, states float32. The keys of a line are those of `kl bench --json`: call_us is the time between
two events around one call, graph_us that of a graph's replay (absent where the call cannot be captured), both medians.

Triton compiles hundreds of candidates of every kernel. --tuners processes share that work through Triton's cache
first; then this process alone measures all candidates and keeps the best, as Triton always does.
"""
import argparse
import datetime
import json
import multiprocessing
import os
import shlex
import statistics
import subprocess
import sys

os.environ["FLA_CACHE_RESULTS"] = "0"
K = V = 128


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="fwd:T=8192,H=32;fwd:T=2048,H=16;fwdbwd:T=8192,H=32;decode:T=1,H=32,N=32")
    parser.add_argument("--tuners", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--json", help="append the lines to this file too")
    parser.add_argument("--commit", help="what to record where there is no git")
    return parser.parse_args()


def parse(case):
    operator, sizes = case.split(":")
    size = {name: int(value) for name, value in (pair.split("=") for pair in sizes.split(","))}
    return operator, {"T": 1, "H": 32, "N": 1} | size


def inputs(T, H, N):
    """Strong gates, unit keys; the packed form of N sequences is N rows of a batch."""
    import torch
    from torch.nn.functional import normalize
    torch.manual_seed(1)
    normal = lambda *shape: torch.randn(*shape, device="cuda")
    bf16 = lambda x: x.to(torch.bfloat16)
    return {
        "q": bf16(normalize(normal(N, T, H, K), dim=-1)), "k": bf16(normalize(normal(N, T, H, K), dim=-1)), "v": bf16(normal(N, T, H, V)),
        "g": bf16(-5 * torch.sigmoid(normal(N, T, H, K))), "beta": bf16(torch.sigmoid(normal(N, T, H))), "h0": normal(N, H, K, V),
        "raw": bf16(normal(N, T, H, K)), "logit": bf16(normal(N, T, H)), "A_log": normal(H) * 0.5, "dt_bias": normal(H * K),
    }


def call_of(operator, T, H, N):
    """The thing to time, and what must be kept alive for it."""
    import torch
    from fla.ops.generalized_delta_rule import chunk_dplr_delta_rule
    from fla.ops.kda import chunk_kda, fused_recurrent_kda
    x = inputs(T, H, N)
    if operator == "fwd":
        def call():
            with torch.no_grad():
                return chunk_kda(x["q"], x["k"], x["v"], x["g"], x["beta"], initial_state=x["h0"], output_final_state=True, safe_gate=True,
                                 lower_bound=-5.0)
    elif operator == "decode":
        def call():
            with torch.no_grad():
                return fused_recurrent_kda(x["q"], x["k"], x["v"], x["g"], x["beta"], initial_state=x["h0"], output_final_state=True)
    elif operator == "dplr":
        a, b = bf16_pair(x)
        def call():
            with torch.no_grad():
                return chunk_dplr_delta_rule(x["q"], x["k"], x["v"], a, b, x["g"], initial_state=x["h0"], output_final_state=True, safe_gate=True)
    elif operator == "fwdbwd":
        leaves = [x[name].requires_grad_() for name in ("q", "k", "v", "raw", "logit", "h0", "A_log", "dt_bias")]
        q, k, v, raw, logit, h0, A_log, dt_bias = leaves
        do, dht = torch.randn_like(v), torch.randn_like(h0)
        def call():
            o, ht = chunk_kda(q, k, v, raw, logit, initial_state=h0, output_final_state=True, A_log=A_log, dt_bias=dt_bias,
                              use_qk_l2norm_in_kernel=True, use_gate_in_kernel=True, use_beta_sigmoid_in_kernel=True)
            return torch.autograd.grad((o, ht), leaves, (do, dht))
    else:
        raise SystemExit(f"{operator}: expected fwd, fwdbwd, decode or dplr")
    return call


def bf16_pair(x):
    """a and b of the DPLR form of KDA."""
    import torch
    a = (x["k"].float() * x["g"].float().exp()).to(torch.bfloat16)
    b = (-x["beta"].float()[..., None] * x["k"].float()).to(torch.bfloat16)
    return a, b


def tune_quickly(share=None):
    """Candidates are measured for 20 ms each; with share = (i, n) only every n-th is compiled, run once and not measured."""
    import triton
    from triton.runtime.autotuner import Autotuner
    prune = Autotuner.prune_configs

    def once(call, quantiles=None, **_):
        call()
        return [1.0] * len(quantiles or (1,))

    def briefly(call, quantiles=None, **_):
        return triton.testing.do_bench(call, warmup=5, rep=20, quantiles=quantiles)

    def pruned(self, *args, **kwargs):
        self.__dict__["do_bench"] = once if share else briefly
        configs = prune(self, *args, **kwargs)
        return (configs[share[0]::share[1]] or configs[:1]) if share else configs

    Autotuner.prune_configs = pruned


def tuner(share, cases):
    import torch
    tune_quickly(share)
    for case in cases:
        operator, size = parse(case)
        try:
            call_of(operator, **size)()
            torch.cuda.synchronize()
        except Exception as e:  # a candidate that does not fit the machine must not stop the others
            print(f"tuner {share[0]}: {case}: {e}", file=sys.stderr)


def event_times(call, runs):
    import torch
    times = []
    for i in range(runs + 3):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        stop.record()
        torch.cuda.synchronize()
        if i >= 3:
            times.append(start.elapsed_time(stop) * 1e3)
    return times


def graph_of(call):
    import torch
    graph = torch.cuda.CUDAGraph()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        call()
    return graph


def least_bytes(operator, T, H, N):
    tokens, states = N * T * H, 2 * 4 * N * H * K * V
    forward = 2 * tokens * ((5 if operator == "dplr" else 3) * K + 2 * V + (operator != "dplr")) + states
    return 2 * forward - 2 * tokens * V if operator == "fwdbwd" else forward


def measure(case, runs):
    import torch
    operator, size = parse(case)
    call = call_of(operator, **size)
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    row = {"family": "dplr" if operator == "dplr" else "kda", "pass": {"dplr": "fwd"}.get(operator, operator),
           "variant": "fla recurrent" if operator == "decode" else "fla chunk", "gate": "softplus" if operator == "fwdbwd" else "strong",
           "B": size["N"], "T": size["T"], "N": size["N"], "H": size["H"], "HV": size["H"], "K": K, "V": V,
           "peak_bytes": torch.cuda.max_memory_allocated() - before}
    times = event_times(call, runs)
    row["call_us"] = statistics.median(times)
    try:
        graph = graph_of(call)
        times = event_times(graph.replay, runs)
        row["graph_us"] = statistics.median(times)
    except Exception as e:
        print(f"{case}: not captured: {e}", file=sys.stderr)
    best = row.get("graph_us", row["call_us"])
    row |= {"min_us": min(times), "max_us": max(times), "runs": runs, "bytes": least_bytes(operator, **size)}
    row["gbps"] = row["bytes"] / best * 1e-3
    return row


def git(*words):
    where = os.path.dirname(os.path.abspath(__file__))
    done = subprocess.run(["git", "-C", where, *words], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def provenance(args):
    import fla
    import torch
    import triton
    driver = subprocess.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True).stdout.strip()
    dirty = git("status", "--porcelain")
    return {"device": torch.cuda.get_device_name(), "driver": driver, "toolkit": torch.version.cuda, "torch": torch.__version__,
            "triton": triton.__version__, "fla": fla.__version__, "commit": args.commit or (git("rev-parse", "--short=12", "HEAD")),
            "dirty": None if dirty is None else bool(dirty), "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "command": shlex.join(["python3", *sys.argv])}


def main():
    args = arguments()
    cases = args.cases.split(";")
    spawn = multiprocessing.get_context("spawn")
    workers = [spawn.Process(target=tuner, args=((i, args.tuners), cases)) for i in range(args.tuners if args.tuners > 1 else 0)]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    tune_quickly()
    where = provenance(args)
    for case in cases:
        try:
            line = json.dumps(measure(case, args.runs) | where)
        except Exception as e:
            print(f"{case}: {e}", file=sys.stderr)
            continue
        print(line, flush=True)
        if args.json:
            with open(args.json, "a") as f:
                f.write(line + "\n")


if __name__ == "__main__":
    main()
