#!/usr/bin/env bash
# Pretrain a small encoder-decoder on Python's own standard library, on this machine, and show what it learned.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bin=.venv/bin
run=runs/quickstart
shards=runs/quickstart-shards
say() { printf '\n==> %s\n' "$*"; }

if [ -f $shards/manifest.json ]; then
  say "shards are in $shards already"
else
  say "1/4 preparing text: the sources and docstrings of Python's standard library"
  mkdir -p runs
  mapfile -t files < <($bin/python - <<'PY'
import pathlib, sysconfig
root = pathlib.Path(sysconfig.get_paths()["stdlib"])
skipped = {"site-packages", "test", "tests", "idlelib", "lib2to3", "encodings", "__pycache__", "config"}
for path in sorted(root.rglob("*.py")):
    parts = set(path.relative_to(root).parts[:-1])
    # Debian's Python has one file under two names, and a text given twice is refused.
    if not parts & skipped and not path.is_symlink() and path.stat().st_size > 500:
        print(path)
PY
  )
  $bin/dist-transformer prepare text "${files[@]}" --documents file --vocab-size 2048 --max-document-tokens 512 --bad-utf8 replace --out $shards
fi

n_gpus=0
if command -v nvidia-smi >/dev/null 2>&1; then n_gpus=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU' || true); fi
ranks=2
if [ "$n_gpus" -eq 1 ]; then ranks=1; fi
say "2/4 training configs/quickstart.yaml on $ranks ranks (ctrl-C saves and stops; the same command goes on)"
launch/local.sh configs/quickstart.yaml --nproc $ranks

say "3/4 held-out text, its gaps filled by the model before and after training"
$bin/python - "$run" <<'PY'
import pathlib, sys

def blocks(path):
    return [[line.split(":", 1)[1].strip() for line in block.splitlines()] for block in path.read_text().strip().split("\n\n")]

files = sorted(pathlib.Path(sys.argv[1], "samples").glob("step-*.txt"))
for (source, before, truth), (_, after, _) in list(zip(blocks(files[0]), blocks(files[-1])))[:4]:
    for name, text in (("text", source), ("before", before), ("after", after), ("truth", truth)):
        print(f"  {name:7} {text[:140]}")
    print()
PY

say "4/4 drawing the run"
picture=$($bin/dist-transformer report $run --png $run/loss.png | tail -n 1)
cat <<END

Done. Where to look next:
  $picture               the loss curve
  $run/metrics.jsonl          every figure, a JSON object a line
  $run/samples/               held-out text with the gaps that the model filled
  $run/wandb/                 the dashboard run; upload an offline one with: $bin/dist-transformer track sync $run
Try it:
  echo 'def __init__(self, ___):' | $bin/dist-transformer generate $run
  launch/local.sh configs/quickstart.yaml --nproc $ranks train.steps=2000  # goes on from the checkpoint
To train again from the start, remove $run.
END
