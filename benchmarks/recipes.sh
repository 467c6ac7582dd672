#!/usr/bin/env bash
# Proof: a recipe of configs/ from a data set's own files to its score, on 2 CPU ranks (RANKS=n: on n).
#   benchmarks/recipes.sh RECIPE DATA_DIR [section.key=value ...]
# RECIPE is the name of a file in configs/; DATA_DIR holds
#   translate_multi30k      {train,val,test2016}.{en,de}  Multi30k task 1, raw
#   translate_multi30k_tok  the same files, lowercased, normalised and tokenised
#   describe_e2e            {train,val}.{mr,ref}          E2E NLG challenge, a meaning representation or sentence a line
#   pronounce_cmudict       {train,val}.tsv               "word TAB phonemes", one pronunciation a line
#   pretrain_novels         train-*.txt[.gz], val.txt     a paragraph a line, an empty line between books
#   finetune_e2e            as describe_e2e; goes on from what pretrain_novels left
# Where they come from, all on GitHub (licences and citations there):
#   Multi30k   multi30k/dataset, data/task1/raw/*.gz, and data/task1/tok/*.lc.norm.tok.*; test2016 is test_2016_flickr
#   E2E NLG    tuetschek/e2e-dataset, trainset.csv and devset.csv: columns mr and ref
#   CMUdict    cmusphinx/cmudict, cmudict.dict: words of a-z and apostrophes, marks like (2) and comments left out; hold out
#              words by their hash, so that no word is in two parts
#   novels     computationalstylistics/100_english_novels, corpus/*.txt
# Shards that are there are used again. Run it again to go on with a run that was stopped.
set -euo pipefail
recipe=${1:?usage: $0 RECIPE DATA_DIR [section.key=value ...]}
data=$(cd "${2:?usage: $0 RECIPE DATA_DIR [section.key=value ...]}" && pwd)
shift 2
cd "$(dirname "${BASH_SOURCE[0]}")/.."
cli=.venv/bin/dist-transformer
config=configs/$recipe.yaml
shards=$($cli config "$config" "$@" --field data.train)
run=$($cli config "$config" "$@" --field run.dir)

prepare() {
  [ -f "$shards/manifest.json" ] || $cli prepare "$@" --out "$shards"
}

train() { # [section.key=value ...]
  local start=$SECONDS
  launch/local.sh "$config" --nproc "${RANKS:-2}" "$@"
  echo "trained in $((SECONDS - start)) s"
}

spell_out() { # FILE.tsv: every letter a word of its own
  awk -F'\t' '{ word = $1; gsub(/./, "& ", word); sub(/ $/, "", word); print word "\t" $2 }' "$1"
}

case $recipe in
  translate_multi30k | translate_multi30k_tok)
    prepare pairs --source "$data/train.en" --target "$data/train.de" \
      --eval-source "$data/val.en" --eval-target "$data/val.de" --vocab-size 6000
    train "$@"
    scoring=()
    [ "$recipe" = translate_multi30k ] || scoring=(--tokenize none)
    $cli evaluate "$run" --source "$data/test2016.en" --reference "$data/test2016.de" \
      --output "$run/test2016.hyp" "${scoring[@]}"
    ;;
  describe_e2e)
    prepare pairs --source "$data/train.mr" --target "$data/train.ref" \
      --eval-source "$data/val.mr" --eval-target "$data/val.ref" --vocab-size 2000
    train "$@"
    $cli evaluate "$run" --source "$data/val.mr" --reference "$data/val.ref" --output "$run/val.hyp" \
      --group-sources --lowercase
    ;;
  pronounce_cmudict)
    letters=$(mktemp -d)
    trap 'rm -rf "$letters"' EXIT
    spell_out "$data/train.tsv" >"$letters/train.tsv"
    spell_out "$data/val.tsv" >"$letters/val.tsv"
    prepare pairs "$letters/train.tsv" --eval-files "$letters/val.tsv" --vocab-size 640
    train "$@"
    cut -f1 "$letters/val.tsv" >"$letters/val.letters"
    cut -f2 "$letters/val.tsv" >"$letters/val.phonemes"
    for ignored in '' '--ignore=[0-9]'; do # with the stress of vowels, and without, as papers count
      $cli evaluate "$run" --source "$letters/val.letters" --reference "$letters/val.phonemes" --output "$run/val.hyp" \
        --group-sources --metrics per,exact_match ${ignored:+"$ignored"}
    done
    ;;
  finetune_e2e)
    prepare pairs --source "$data/train.mr" --target "$data/train.ref" \
      --eval-source "$data/val.mr" --eval-target "$data/val.ref" --tokenizer shards/novels/tokenizer.json
    train "$@"
    $cli evaluate "$run" --source "$data/val.mr" --reference "$data/val.ref" --output "$run/val.hyp" \
      --group-sources --lowercase
    ;;
  pretrain_novels)
    prepare text "$data"/train-*.txt* --eval-files "$data/val.txt" --documents paragraph --vocab-size 8000
    train "$@"
    $cli report "$run" --png "$run/loss.png"
    ;;
  *)
    echo "$recipe is not one of the recipes at the top of $0" >&2
    exit 2
    ;;
esac
