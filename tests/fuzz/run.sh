#!/bin/sh
# run.sh SECONDS PROGRAM... runs each libFuzzer program for that time on a copy of its seeds, JOBS (as many as there are processors) at a
# time; one line each, and a non-zero exit status when one found a crash, a leak or a hang.
one() {
    seconds=$1 program=$2
    name=$(basename "$program")
    corpus="$program.corpus"
    artifacts="$program.found/"
    rm -rf "$artifacts"
    mkdir -p "$corpus" "$artifacts"
    cp "tests/fuzz/corpus/${name#fuzz_}"/* "$corpus"/ 2>/dev/null
    OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 LSAN_OPTIONS="suppressions=tests/lsan.supp:print_suppressions=0" \
        "$program" -max_total_time="$seconds" -rss_limit_mb=2048 -malloc_limit_mb=1024 -timeout=60 -max_len=16384 \
        -artifact_prefix="$artifacts" -print_final_stats=1 "$corpus" >"$program.log" 2>&1
    status=$?
    runs=$(sed -n 's/^stat::number_of_executed_units: *//p' "$program.log")
    if [ $status -eq 0 ] && [ "${runs:-0}" -gt 0 ]; then
        printf '%-24s %9d runs in %d s, nothing found\n' "$name" "$runs" "$seconds"
        return 0
    fi
    printf '%-24s FAILED with status %d; its input is in %s\n' "$name" $status "$artifacts"
    grep -E 'ERROR|SUMMARY|^ +#[0-9] |runtime error|deadly signal' "$program.log" | head -20
    return 1
}

if [ "$1" = --one ]; then
    one "$2" "$3"
    exit $?
fi
seconds=$1
shift
printf '%s\n' "$@" | xargs -n 1 -P "${JOBS:-$(nproc)}" sh "$0" --one "$seconds"
