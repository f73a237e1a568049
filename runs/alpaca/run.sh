#!/bin/sh
# Stanford Alpaca's recipe on a file in its format: runs/alpaca/run.sh DATA [OPTION of dapji tune]...
# 100 rows are held out. What is there is kept, so that after Ctrl-C the same command goes on.
set -eu
data=${1:?the file of examples, as: runs/alpaca/run.sh alpaca_data.json}
shift
here=runs/alpaca
out=$here/out
python3 runs/split.py "$data" $out/data --held-out 100
[ -e $out/tuned/dapji.json ] || dapji tune $here/recipe.toml --resume "$@"
