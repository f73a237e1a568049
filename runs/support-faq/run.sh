#!/bin/sh
# Learns the FAQ and asks what was held out, before and after: runs/support-faq/run.sh [SEED]...
# What is there is kept, so that after Ctrl-C the same command goes on.
set -eu
here=runs/support-faq
for seed in "${@:-0}"; do
  out=$here/out/$seed
  [ -e "$out/dapji.json" ] || dapji tune $here/recipe.toml --resume seed="$seed" output="$out"
  # the adapter is used as it is, on the base as its file has it: quantised
  [ -e "$out.json" ] || dapji eval smollm2-135m $here/held-out.jsonl --adapter "$out" --against smollm2-135m \
    --by language --max-tokens 160 --output "$out.json"
done
