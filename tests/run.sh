#!/bin/sh
# Runs each test program given, shows what failed, and ends in one plain line of totals.
passed=0 failed=0 skipped=0
# A thread that waits soon sleeps: on a machine that is busy with other work, spinning threads keep each other from running.
export GOMP_SPINCOUNT="${GOMP_SPINCOUNT:-1000}"
export LSAN_OPTIONS="suppressions=tests/lsan.supp:print_suppressions=0"
for program in "$@"; do
    log="$program.log"
    start=$(date +%s.%N)
    "$program" >"$log" 2>&1
    status=$?
    seconds=$(echo "$(date +%s.%N) $start" | awk '{printf "%.1f", $1 - $2}')
    p=$(sed -n 's/^\[  PASSED  \] \([0-9]*\) test(s)\..*/\1/p' "$log" | awk '{s += $1} END {print s + 0}')
    f=$(sed -n 's/^\[  FAILED  \] \([0-9]*\) test(s), listed below:.*/\1/p' "$log" | awk '{s += $1} END {print s + 0}')
    s=$(sed -n 's/^\[  SKIPPED \] \([0-9]*\) test(s), listed below:.*/\1/p' "$log" | awk '{s += $1} END {print s + 0}')
    # A program that died before its totals is one failure more than it could count.
    if [ $status -ne 0 ] && [ "$f" -eq 0 ]; then
        f=1
    fi
    if [ $((p + f + s)) -eq 0 ]; then
        echo "$(basename "$program"): ran no test"
        f=1
    fi
    printf '%-32s %4d passed %3d failed %3d skipped  %6s s\n' "$(basename "$program")" "$p" "$f" "$s" "$seconds"
    if [ "$f" -ne 0 ]; then
        grep -v -E '^\[ +(RUN|OK) ' "$log" | tail -n 60
    fi
    passed=$((passed + p)) failed=$((failed + f)) skipped=$((skipped + s))
done
echo "$passed passed, $failed failed, $skipped skipped"
[ "$failed" -eq 0 ] && [ "$passed" -gt 0 ]
