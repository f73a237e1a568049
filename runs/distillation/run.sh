#!/bin/sh
# What a teacher adds: runs/distillation/run.sh [OPTION of dapji tune]...
# Teacher, tokenizer and text are those of runs/scratch/run.sh, which runs first. For each of three seeds a student with
# its own first weights and order of examples learns from the labels alone, and again with the teacher beside them.
set -eu
here=runs/distillation
out=$here/out
scratch=runs/scratch/out
for seed in 0 1 2; do
  [ -e $out/student-$seed ] ||
    dapji new $out/student-$seed --tokenizer $scratch/start --layers 2 --context 256 --seed $seed
  [ -e $out/labels-$seed/dapji.json ] ||
    dapji tune $here/text.toml model=$out/student-$seed seed=$seed output=$out/labels-$seed --resume "$@"
  [ -e $out/taught-$seed/dapji.json ] ||
    dapji tune $here/text.toml model=$out/student-$seed seed=$seed output=$out/taught-$seed --resume \
      method="{ name = 'distill', teacher = '$scratch/pretrained' }" "$@"
done
tail -qn 1 $out/labels-?/metrics.jsonl $out/taught-?/metrics.jsonl
