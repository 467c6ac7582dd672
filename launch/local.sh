#!/usr/bin/env bash
# Train on this machine: one rank for each GPU, or CPU ranks.
#   launch/local.sh CONFIG.yaml [--nproc N] [section.key=value ...]
# Rank 0 is shown; every rank writes a log file under RUN_DIR/logs, and the first error of any rank is shown at the end.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-$here/../.venv/bin/python}
[ -x "$python" ] || python=$(command -v python3)

usage() { sed -n '2,4s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }
nproc=""
arguments=()
while [ $# -gt 0 ]; do
  case $1 in
    -h | --help) usage; exit 0 ;;
    --nproc) [ $# -ge 2 ] || { echo "local.sh: --nproc needs a number" >&2; exit 2; }; nproc=$2; shift 2 ;;
    --nproc=*) nproc=${1#*=}; shift ;;
    *) arguments+=("$1"); shift ;;
  esac
done
[ ${#arguments[@]} -gt 0 ] || { usage >&2; exit 2; }

# One process reads the configuration first, so that a mistake is one sentence and not one for each rank.
run_dir=$("$python" -m dist_transformer config "${arguments[@]}" --field run.dir) || exit $?

n_gpus=0
if command -v nvidia-smi >/dev/null 2>&1; then n_gpus=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU' || true); fi
n_cores=$(getconf _NPROCESSORS_ONLN)
if [ -z "$nproc" ]; then
  if [ "$n_gpus" -gt 0 ]; then nproc=$n_gpus; else nproc=1; fi
fi
case $nproc in '' | *[!0-9]* | 0) echo "local.sh: --nproc $nproc is not a number of ranks" >&2; exit 2 ;; esac
if [ "$n_gpus" -eq 0 ] && [ -z "${OMP_NUM_THREADS:-}" ]; then
  export OMP_NUM_THREADS=$((n_cores / nproc > 0 ? n_cores / nproc : 1))
fi
# shellcheck source=launch/env.sh
source "$here/env.sh"

logs=$run_dir/logs/$(date +%Y%m%d-%H%M%S)
mkdir -p "$logs"
status=0
# --standalone takes a free port for the rendezvous; --local-ranks-filter shows rank 0, --tee keeps every rank's output.
# USR1 (save and leave) is for the ranks: torchrun itself would die of it, so it ignores it; the ranks set their handler.
(trap '' USR1; exec "$python" -m torch.distributed.run --standalone --nnodes 1 --nproc-per-node "$nproc" \
  --log-dir "$logs" --redirects 3 --tee 3 --local-ranks-filter 0 \
  -m dist_transformer train "${arguments[@]}" 2>"$logs/launcher.log") &
child=$!
trap 'kill -TERM "$child" 2>/dev/null || true' TERM INT
trap 'pkill -USR1 -P "$child" 2>/dev/null || true' USR1
# A trapped signal ends `wait` early, so wait until the child is really gone.
while kill -0 "$child" 2>/dev/null; do wait "$child" && status=0 || status=$?; done
if [ "$status" -ne 0 ]; then
  # The rank that failed first wrote first; the others only lost their peer.
  first=$(find "$logs" -name stderr.log -size +0 -printf '%T@ %p\n' | sort -n | head -n 1 | cut -d' ' -f2-)
  if [ -n "$first" ] && [ "$(basename "$(dirname "$first")")" != 0 ]; then
    echo "--- first error, rank $(basename "$(dirname "$first")") ($first)" >&2
    tail -n 15 "$first" >&2
  fi
  echo "local.sh: training ended with status $status; all ranks' output is in $logs" >&2
fi
exit "$status"
