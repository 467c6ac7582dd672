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
# Rank 0 speaks. On a terminal it gets the screen itself, for its live line; elsewhere its lines are shown and kept.
# What ranks write to stderr goes to their log files; it is shown below if training fails.
redirects=0:2
for ((rank = 1; rank < nproc; rank++)); do redirects+=,$rank:3; done
[ -t 1 ] || exec > >(exec tee "$logs/rank-0.log")
# --standalone takes a free port for the rendezvous.
# A request to stop goes to the ranks, as USR1: they save and end with 0, and so does torchrun. Torchrun itself would
# die of it, so it ignores it (ranks set their own handler), and ctrl-C does not reach its session.
(trap '' USR1; exec setsid "$python" -m torch.distributed.run --standalone --nnodes 1 --nproc-per-node "$nproc" \
  --log-dir "$logs" --redirects "$redirects" -m dist_transformer train "${arguments[@]}" 2>"$logs/launcher.log") &
child=$!
# shellcheck disable=SC2317  # the traps call it
stop() {
  trap 'kill -TERM "$child" 2>/dev/null || true' INT TERM  # the second time: at once
  pkill -USR1 -P "$child" 2>/dev/null || true
}
trap stop TERM INT USR1
# A trapped signal ends `wait` early, so wait until the child is really gone.
while true; do
  wait "$child" && status=0 || status=$?
  kill -0 "$child" 2>/dev/null || break
done
if [ "$status" -ne 0 ]; then
  # The rank that failed first has the reason; the others only lost their peer. torchrun's log knows which it was.
  first=$(sed -n '/Root Cause/,$s/.*local_rank: \([0-9]*\).*/\1/p' "$logs/launcher.log" | head -n 1)
  # What every rank found, rank 0 alone prints.
  reason=$(find "$logs" -path "*/${first:-0}/stderr.log" -size +0 | head -n 1)
  [ -n "$reason" ] || { first=0; reason=$(find "$logs" -path "*/0/stderr.log" -size +0 | head -n 1); }
  if [ -n "$reason" ]; then
    [ "${first:-0}" = 0 ] || echo "local.sh: rank $first failed first:" >&2
    tail -n 20 "$reason" >&2
  else
    tail -n 20 "$logs/launcher.log" >&2
  fi
  echo "local.sh: training ended with status $status; all ranks' output is in $logs" >&2
fi
exit "$status"
