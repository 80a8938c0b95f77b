#!/bin/sh
# Everything that is claimed of the kernels on a GPU: right on every case, clean under compute-sanitizer, and how fast. About
# five minutes on one H100.
# usage: experiments/h100/run.sh [KL [OUT [PARTS]]]   (from the repository root after make, or from a folder that pack.sh made)
set -u
kl=${1:-build/kl}
out=${2:-results/h100}
parts=${3:-verify sanitize bench}
golden=tests/golden/kda
mkdir -p "$out"
failed=0

# step NAME COMMAND...: a heading, the command, and what became of it
step() {
    echo "== $1"
    shift
    "$@" || failed=$((failed + 1))
}

# The last lines of a long listing, and every line that reports a failure.
verify() {
    "$kl" verify "$@" --device cuda >"$out/verify.txt" 2>&1
    status=$?
    grep -E '^FAIL|^kl:' "$out/verify.txt"
    tail -n 1 "$out/verify.txt"
    return $status
}

sanitize() {
    tool=$1
    shift
    timeout 300 compute-sanitizer --tool "$tool" --error-exitcode 1 "$kl" verify "$@" --device cuda >"$out/sanitizer.txt" 2>&1
    status=$?
    grep -E '^FAIL|^kl:|ERROR SUMMARY|RACECHECK SUMMARY' "$out/sanitizer.txt"
    return $status
}

# bench NAME ARGUMENT...: rows of the family that NAME begins with
bench() {
    name=$1
    shift
    "$kl" bench "${name%%_*}" --device cuda --json "$out/$name.jsonl" "$@"
}

verify_all() {
    step "golden data" verify kda "$golden"
    step "random problems" verify kda --random --cases 168
    step "MLA, random problems" verify mla --random --cases 52
    step "MoE, random problems" verify moe --random --cases 52
    step "layers" verify layers
}

# A representative set: packed value heads, the fast path's dimensions over five tiles, and random problems.
sanitize_all() {
    if ! command -v compute-sanitizer >/dev/null; then
        echo "== compute-sanitizer is not here: its checks are left out"
        return
    fi
    for tool in memcheck racecheck synccheck initcheck; do
        step "$tool, 65 tokens" sanitize $tool kda "$golden/05_bounded_T65_H2_HV4_K16_V16.safetensors"
        step "$tool, 130 tokens, 128 channels" sanitize $tool kda "$golden/06_kimi_T130_H1_HV1_K128_V128.safetensors"
        step "$tool, random problems" sanitize $tool kda --random --cases 12
        step "$tool, MLA" sanitize $tool mla --random --cases 4
        step "$tool, MoE" sanitize $tool moe --random --cases 4
    done
}

bench_all() {
    for gate in slow mixed strong; do
        for list in ten heads32 heads96; do
            step "forward, $list, $gate" bench "kda_${list}_$gate" --shapes $list --gate $gate --variant chunk
        done
    done
    step "training" bench kda_train --shapes train --variant chunk
    step "decoding" bench kda_decode --shapes decode --variant recurrent
    step "convolution, gated norm, decode layer" bench kda_around --shapes around
    step "KDA, general DPLR, Gated DeltaNet" bench kda_fig2 --shapes fig2 --variant chunk
    step "granularity of the gate" bench kda_gates --shapes gates --variant chunk
    step "MLA, prefill and training" bench mla_prefill --shapes prefill --variant chunk
    step "MLA, backward, the forward pass again" bench mla_again --shapes again --variant chunk
    step "MLA, hardly any expansion" bench mla_alone --shapes alone --variant chunk
    step "MLA, the end of a long context" bench mla_late --shapes late
    step "MLA, some queries behind many keys" bench mla_few --shapes few
    step "MLA, decoding" bench mla_decode --shapes decode --variant recurrent
    step "MoE, forward" bench moe_tokens --shapes tokens
    step "MoE, backward" bench moe_train --shapes train
    step "layers" bench layers
}

for part in $parts; do
    "${part}_all"
done
rm -f "$out/verify.txt" "$out/sanitizer.txt"
echo "== $failed steps failed"
[ "$failed" -eq 0 ]
