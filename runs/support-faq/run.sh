#!/bin/sh
# Learns the FAQ and asks what was held out, before and after: runs/support-faq/run.sh [SEED]...
# What is there is kept, so that after Ctrl-C the same command goes on.
set -eu
here=runs/support-faq
for seed in "${@:-0}"; do
  out=$here/out/$seed
  [ -e "$out/dapji.json" ] || dapji tune $here/recipe.toml --resume seed="$seed" output="$out"
  [ -e "$out.json" ] || dapji eval "$out" $here/held-out.jsonl --against smollm2-135m --by language --max-tokens 160 \
    --output "$out.json"
done
