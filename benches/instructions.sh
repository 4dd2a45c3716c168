#!/bin/sh
# Instructions per student token of the alignment and of its floor (reading the length of every token), counted by
# valgrind, so that they are the same on every machine of a kind: sh benches/instructions.sh
# The pairs are those that `python benches/kernel_data.py` writes. Writes benches/results/instructions.txt.
set -eu
cd "$(dirname "$0")/.."
cargo build --quiet --release --example instructions
program=target/release/examples/instructions
work=$(mktemp -d)
trap 'rm -r "$work"' EXIT

# Prints "name tokens share count" of one run.
count() {
    RAYON_NUM_THREADS=1 valgrind --tool=callgrind --callgrind-out-file=/dev/null --collect-atstart=no \
        --toggle-collect="*counted_$1*" --log-file="$work/log" "$program" "$@" >"$work/out"
    echo "$(cat "$work/out") $(sed -n 's/.*Collected : //p' "$work/log")"
}

{
    echo "Instructions per student token, in rows of 512: sh benches/instructions.sh"
    echo "$(uname -m), $(rustc --version), release build for the baseline of the architecture"
    echo
    printf '%-24s %12s %12s %12s %12s\n' pair 'one to one' alignment floor ratio
    for file in benches/.data/*.bin ''; do
        if [ -n "$file" ] && [ ! -e "$file" ]; then continue; fi
        echo "$(count align ${file:+"$file"}) $(count floor ${file:+"$file"})"
    done | awk '{ printf "%-24s %12s %12.1f %12.1f %12.1f\n", $1, $3, $4 / $2, $8 / $2, $4 / $8 }'
} | tee "$work/table"
mkdir -p benches/results
mv "$work/table" benches/results/instructions.txt
