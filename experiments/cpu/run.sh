#!/bin/sh
# The CPU figures of the README: every family, and the model beside its peer. Ten quiet minutes on two cores.
# usage: experiments/cpu/run.sh [PEER_CHECKPOINT [PYTHON_WITH_TRANSFORMERS]]   (from the repository root, after make)
set -eu
out=results/cpu
mkdir -p "$out"
kl="build/kl bench --threads 2"

$kl kda --shapes 'T=4096,H=4;T=1024;T=16384' --pass fwd --json "$out/kda_fwd.jsonl"
$kl kda --shapes 'T=4096,H=4' --pass bwd --json "$out/kda_bwd.jsonl"
$kl mla --shapes 'N=1,T=262144,H=32,latent=bf16' --pass decode --variant recurrent --json "$out/mla_decode.jsonl"
$kl mla --shapes 'N=1,T=2048,H=8' --pass fwd --pass bwd --variant chunk --json "$out/mla_chunk.jsonl"
$kl moe --json "$out/moe.jsonl"

[ $# -ge 1 ] || exit 0
name=$(basename "$1")
$kl model "$1" --shapes 'T=2048,new=64;T=256,new=64' --json "$out/model_$name.jsonl"
[ $# -ge 2 ] || exit 0
rm -f "$out/model_${name}_transformers.jsonl"
"$2" experiments/peers/transformers_cpu.py "$1" --threads 2 --json "$out/model_${name}_transformers.jsonl"
