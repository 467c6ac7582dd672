#!/usr/bin/env bash
# Proof: Multi30k English to German from raw text, on 2 CPU ranks, in at most 30 minutes; prints BLEU on test2016.
#   benchmarks/translate_multi30k.sh DATA_DIR [section.key=value ...]
# DATA_DIR holds train, val and test2016, each as .en and .de (the Multi30k task 1 raw files, unpacked).
set -euo pipefail
data=${1:?usage: $0 DATA_DIR [section.key=value ...]}
shift
cd "$(dirname "${BASH_SOURCE[0]}")/.."
cli=.venv/bin/dist-transformer
shards=shards/multi30k-en-de
[ -f $shards/manifest.json ] || $cli prepare pairs --source "$data/train.en" --target "$data/train.de" \
  --eval-source "$data/val.en" --eval-target "$data/val.de" --vocab-size 6000 --out $shards
run=$($cli config configs/translate_multi30k.yaml "$@" --field run.dir)
start=$SECONDS
launch/local.sh configs/translate_multi30k.yaml --nproc 2 "$@"
echo "trained in $((SECONDS - start)) s"
$cli evaluate "$run" --source "$data/test2016.en" --reference "$data/test2016.de" --output "$run/test2016.hyp"
