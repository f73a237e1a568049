#!/bin/sh
# Learns sums from rewards and asks those that were held out, before and after: runs/arithmetic/run.sh [SEED]...
# What is there is kept, so that after Ctrl-C the same command goes on.
set -eu
here=runs/arithmetic
for seed in "${@:-0}"; do
  out=$here/out/$seed
  [ -e "$out/dapji.json" ] || dapji tune $here/recipe.toml --resume seed="$seed" output="$out"
  [ -e "$out.json" ] || dapji eval smollm2-135m $here/held-out.jsonl --adapter "$out" --against smollm2-135m \
    --max-tokens 16 --output "$out.json"
done
