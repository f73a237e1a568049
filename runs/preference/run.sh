#!/bin/sh
# DPO on a file of preferences: runs/preference/run.sh PAIRS [OPTION of dapji tune]...
# 600 pairs are held out, and compared before and after. What is there is kept, so that after Ctrl-C the same command goes on.
set -eu
pairs=${1:?the file of preferences, as: runs/preference/run.sh harmless-base-test.jsonl.gz}
shift
here=runs/preference
out=$here/out
python3 runs/split.py "$pairs" $out/data --held-out 600
[ -e $out/tuned/dapji.json ] || dapji tune $here/recipe.toml --resume "$@"
[ -e $out/compared.json ] || python3 $here/compare.py $out/data/held-out.jsonl --adapter $out/tuned -o $out/compared.json
