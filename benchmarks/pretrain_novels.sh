#!/usr/bin/env bash
# Proof: span-corruption pretraining on plain English text, on 2 CPU ranks, for about half an hour; draws the curve.
#   benchmarks/pretrain_novels.sh DATA_DIR [section.key=value ...]
# DATA_DIR holds train-*.txt (or .txt.gz), a paragraph a line and an empty line between books, and val.txt.
set -euo pipefail
data=${1:?usage: $0 DATA_DIR [section.key=value ...]}
shift
cd "$(dirname "${BASH_SOURCE[0]}")/.."
cli=.venv/bin/dist-transformer
shards=shards/novels
[ -f $shards/manifest.json ] || $cli prepare text "$data"/train-*.txt* --eval-files "$data/val.txt" \
  --documents paragraph --vocab-size 8000 --out $shards
run=$($cli config configs/pretrain_novels.yaml "$@" --field run.dir)
start=$SECONDS
launch/local.sh configs/pretrain_novels.yaml --nproc 2 "$@"
echo "trained in $((SECONDS - start)) s"
$cli report "$run" --png "$run/loss.png"
