#!/bin/sh
# Runs each test program given, JOBS (as many as there are processors) at a time, shows what failed, and ends in one plain line of totals.
# A thread that waits soon sleeps: on a machine that is busy with other work, spinning threads keep each other from running.
export GOMP_SPINCOUNT="${GOMP_SPINCOUNT:-1000}"
export LSAN_OPTIONS="suppressions=tests/lsan.supp:print_suppressions=0"

# count LOG WORD: how many tests the program's groups report under WORD
count() {
    sed -n "s/^\[ *$2 *\] \([0-9]*\) test(s).*/\1/p" "$1" | awk '{ s += $1 } END { print s + 0 }'
}

# one PROGRAM: its line, and what it said if it failed
one() {
    log="$1.log"
    start=$(date +%s.%N)
    "$1" >"$log" 2>&1
    status=$?
    seconds=$(echo "$(date +%s.%N) $start" | awk '{ printf "%.1f", $1 - $2 }')
    passed=$(count "$log" PASSED) failed=$(count "$log" FAILED) skipped=$(count "$log" SKIPPED)
    # A program that died before its totals is one failure more than it could count, and so is one that ran nothing.
    if { [ $status -ne 0 ] && [ "$failed" -eq 0 ]; } || [ $((passed + failed + skipped)) -eq 0 ]; then
        failed=1
    fi
    printf '%-32s %4d passed %3d failed %3d skipped  %6s s\n' "$(basename "$1")" "$passed" "$failed" "$skipped" "$seconds"
    if [ "$failed" -ne 0 ]; then
        echo "status $status after $(sed -n 's/^\[ RUN *\] //p' "$log" | tail -n 1), the end of $log:"
        grep -v -E '^\[ +(RUN|OK) ' "$log" | tail -n 60
    fi
}

if [ "$1" = --one ]; then
    all=$(one "$2")
    echo "$all"
    exit 0
fi
lines=$(mktemp)
trap 'rm -f "$lines"' EXIT
printf '%s\n' "$@" | xargs -n 1 -P "${JOBS:-$(nproc)}" sh "$0" --one | tee "$lines"
awk '$3 == "passed" && $5 == "failed" && $7 == "skipped" { p += $2; f += $4; s += $6; n++ }
     END { printf "%d passed, %d failed, %d skipped\n", p, f, s; exit f > 0 || p == 0 || n != '$#' }' "$lines"
