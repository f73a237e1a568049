#!/bin/sh
# A model from scratch: runs/scratch/run.sh TEXT [OPTION of dapji tune]...
# The last tenth of the text is held out. What is there is kept, so that after Ctrl-C the same command goes on.
set -eu
text=$1
shift
here=runs/scratch
out=$here/out
mkdir -p $out
size=$(wc -c < "$text")
head -c $((size * 9 / 10)) "$text" > $out/train.txt
tail -c +$((size * 9 / 10 + 1)) "$text" > $out/held-out.txt
[ -e $out/start ] || dapji new $out/start $out/train.txt --layers 4 --dim 192 --vocab-size 1024 --context 256
[ -e $out/pretrained/dapji.json ] || dapji tune $here/recipe.toml --resume "$@"
[ -e $out/chat/dapji.json ] || dapji tune $here/chat.toml --resume "$@"
dapji run $out/pretrained "First Citizen:" --max-tokens 100 --seed 1
dapji chat --model $out/chat "How long do I have to return my Maru One?"
