#!/usr/bin/env bash
# Train on several machines: run this on each node, with the same arguments.
#   MASTER_ADDR=head-node NNODES=2 NODE_RANK=0 launch/node.sh CONFIG.yaml [--nproc N] [--max-restarts N] [section.key=value ...]
# As a Slurm job step (srun, one task a node) it needs no variable: see slurm/train.sbatch. RUN_DIR must be on a file
# system that all nodes share. Node 0 shows the progress; each rank writes a log file under RUN_DIR/logs.
#
# Variables, and what stands in for them in a Slurm job step:
#   MASTER_ADDR  node 0, as the other nodes reach it   [the first node of the job]
#   MASTER_PORT  a port that is free there             [from job number and restart count; else 29500]
#   NNODES       how many nodes; 2:4 for 2 to 4         [the step's]
#   NODE_RANK    which one this is, from 0             [the task's]
#   NPROC        ranks on this node, as --nproc        [its GPUs; 1 where there are none]
#   RDZV_ID      name of the meeting                   [job number and restart count; else dist_transformer]
#   RDZV_TIMEOUT seconds that nodes wait for each other [600]
# --max-restarts N: where a rank fails, all ranks start again from the last checkpoint, N times [0].
# NNODES=MIN:MAX goes on without nodes that fail, and takes in nodes that come (again), as long as MIN and node 0 are there.
# SIGUSR1, SIGTERM or ctrl-C: the ranks save and end; the same command goes on from there.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
launcher_name=${LAUNCHER:-node.sh} # launch/local.sh is this script on one node
export DIST_TRANSFORMER_CLOCK="${SLURM_STEP_ID:+${DIST_TRANSFORMER_CLOCK:-}} node.sh=$EPOCHREALTIME"

usage() { sed -n '2,18s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }
refuse() { echo "$launcher_name: $*" >&2; exit 2; }
is_number() { case $1 in '' | *[!0-9]*) return 1 ;; esac; }

# The address of a Slurm job's first node: its name where this machine can look it up, else what Slurm has for it.
head_address() {
  local name address
  command -v scontrol >/dev/null 2>&1 || refuse "MASTER_ADDR is not set, and there is no scontrol here to ask for the job's first node"
  name=$(scontrol show hostnames "${SLURM_JOB_NODELIST:-}" | head -n 1)
  [ -n "$name" ] || refuse "MASTER_ADDR is not set, and SLURM_JOB_NODELIST names no node"
  if getent ahosts "$name" >/dev/null 2>&1; then
    echo "$name"
  else
    address=$(scontrol -o show node "$name" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
    echo "${address:-$name}"
  fi
}

nproc=${NPROC:-}
max_restarts=0
arguments=()
while [ $# -gt 0 ]; do
  case $1 in
    -h | --help) usage; exit 0 ;;
    --head-address) head_address; exit 0 ;; # for batch scripts
    --nproc | --max-restarts)
      [ $# -ge 2 ] || refuse "$1 needs a number"
      if [ "$1" = --nproc ]; then nproc=$2; else max_restarts=$2; fi
      shift 2 ;;
    --nproc=*) nproc=${1#*=}; shift ;;
    --max-restarts=*) max_restarts=${1#*=}; shift ;;
    -*) refuse "there is no option $1 (see launch/$launcher_name --help)" ;;
    *) arguments+=("$1"); shift ;;
  esac
done
[ ${#arguments[@]} -gt 0 ] || refuse "no configuration: launch/$launcher_name CONFIG.yaml [options] (see launch/$launcher_name --help)"

if [ -n "${SLURM_JOB_ID:-}" ] && [ -z "${NODE_RANK:-}" ]; then
  [ -n "${SLURM_STEP_ID:-}" ] || refuse "in a Slurm job it is started by srun, one task on each node: srun --ntasks-per-node=1 launch/node.sh ..."
  NNODES=${NNODES:-${SLURM_STEP_NUM_NODES:-$SLURM_NNODES}}
  NODE_RANK=$SLURM_NODEID
  [ "${SLURM_STEP_NUM_TASKS:-$NNODES}" = "$NNODES" ] ||
    refuse "srun started $SLURM_STEP_NUM_TASKS tasks on $NNODES nodes; it must be one a node: --ntasks-per-node=1 (ranks are counted by --nproc)"
  MASTER_ADDR=${MASTER_ADDR:-$(head_address)}
  # Below the ephemeral ports, different for two jobs that share a node, and another one at the next start.
  MASTER_PORT=${MASTER_PORT:-$((10000 + (SLURM_JOB_ID + 1000 * ${SLURM_RESTART_COUNT:-0}) % 20000))}
  # A requeued job must not meet what is left of its own former run.
  RDZV_ID=${RDZV_ID:-$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}}
fi
[ -n "${NNODES:-}" ] || refuse "NNODES is not set: how many nodes take part (on one machine, launch/local.sh is simpler)"
least=${NNODES%%:*} most=${NNODES#*:}
{ is_number "$least" && is_number "$most" && [ "$least" -gt 0 ] && [ "$least" -le "$most" ]; } ||
  refuse "NNODES=$NNODES is not a number of nodes, such as 4, nor a range, such as 2:4"
[ -n "${NODE_RANK:-}" ] || refuse "NODE_RANK is not set: which of the $most nodes this is, from 0"
{ is_number "$NODE_RANK" && [ "$NODE_RANK" -lt "$most" ]; } || refuse "NODE_RANK=$NODE_RANK is not one of 0 to $((most - 1)) (NNODES=$NNODES)"
[ -n "${MASTER_ADDR:-}" ] || refuse "MASTER_ADDR is not set: the name or address of node 0, as the other nodes reach it"
MASTER_PORT=${MASTER_PORT:-29500}
{ is_number "$MASTER_PORT" && [ "$MASTER_PORT" -ge 1 ] && [ "$MASTER_PORT" -le 65535 ]; } || refuse "MASTER_PORT=$MASTER_PORT is not a port"
{ is_number "$max_restarts"; } || refuse "--max-restarts $max_restarts is not a number"
RDZV_TIMEOUT=${RDZV_TIMEOUT:-600}
{ is_number "$RDZV_TIMEOUT" && [ "$RDZV_TIMEOUT" -gt 0 ]; } || refuse "RDZV_TIMEOUT=$RDZV_TIMEOUT is not a number of seconds"

n_gpus=0
if [ -n "${SLURM_GPUS_ON_NODE:-}" ]; then
  n_gpus=$SLURM_GPUS_ON_NODE
elif [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
  n_gpus=$(tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c . || true)
elif command -v nvidia-smi >/dev/null 2>&1; then
  n_gpus=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU' || true)
fi
if [ -z "$nproc" ]; then nproc=$((n_gpus > 0 ? n_gpus : 1)); fi
{ is_number "$nproc" && [ "$nproc" -gt 0 ]; } || refuse "--nproc $nproc is not a number of ranks"
# The cores that this process may use: a job's share of its node, not all of it.
n_cores=$(env -u OMP_NUM_THREADS nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
if [ "$n_gpus" -eq 0 ] && [ -z "${OMP_NUM_THREADS:-}" ]; then
  export OMP_NUM_THREADS=$((n_cores / nproc > 0 ? n_cores / nproc : 1))
fi

python=${PYTHON:-$here/../.venv/bin/python}
[ -x "$python" ] || python=$(command -v python3) || refuse "there is no Python: run make setup, or set PYTHON"
# One process reads the configuration first, so that a mistake is one sentence and not one for each rank. In a job, the batch
# script has done so.
run_dir=${DIST_TRANSFORMER_RUN_DIR:-}
if [ -z "$run_dir" ] || [ -z "${SLURM_STEP_ID:-}" ]; then
  run_dir=$("$python" -m dist_transformer config "${arguments[@]}" --field run.dir) || exit $?
fi
# shellcheck source=launch/env.sh
source "$here/env.sh"

say() {
  if [ "$NNODES" = 1 ]; then echo "$launcher_name: $*"; else echo "$launcher_name: node $NODE_RANK of $NNODES ($(uname -n)): $*"; fi
}
[ "$n_cores" -ge "$nproc" ] ||
  say "only $n_cores CPU core(s) for $nproc ranks: ask for more (Slurm: --cpus-per-task or --exclusive)" >&2
logs=$run_dir/logs/$(date +%Y%m%d-%H%M%S)
if [ -n "${SLURM_JOB_ID:-}" ]; then logs=$run_dir/logs/job-$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}; fi
logs+=/node-$NODE_RANK
mkdir -p "$logs"

# Rank 0 speaks, on node 0. On a terminal it gets the screen itself, for its live line; elsewhere its lines are shown and
# kept. Slurm signals every process of a step: what keeps the lines must outlive the ranks that save.
redirects=0:2
for ((rank = 1; rank < nproc; rank++)); do redirects+=,$rank:3; done
tee=""
if [ "$NODE_RANK" -eq 0 ] && [ ! -t 1 ]; then
  exec > >(trap '' USR1 TERM INT; exec tee -a "$logs/rank-0.log")
  tee=$!
fi
say "$nproc rank(s), meeting at $MASTER_ADDR:$MASTER_PORT; their output is kept in $logs"

# torchrun's own rendezvous sees a node that restarts its ranks and lets all others restart theirs. It numbers nodes by the
# order of their addresses as text, and only the first one's address is used: so node 0 gives the address under which
# all know it, and the others a text that sorts after any address, in the order of their numbers.
if [ "$NODE_RANK" -eq 0 ]; then is_host=1 address=$MASTER_ADDR; else
  is_host=0
  printf -v address '~%06d.%s' "$NODE_RANK" "$(uname -n)"
fi
# A request to stop goes to the ranks, as USR1: they save and end with 0, and so does torchrun. Torchrun itself would
# die of USR1, and on TERM it gives its ranks 30 seconds: it ignores both (ranks set their own handler).
export PET_SIGNALS_TO_HANDLE=SIGINT,SIGHUP,SIGQUIT
# After a restart, ranks must not find their peers' old addresses. In the store that nodes share, keys are kept apart by each
# node's own count of failures, which differ; so ranks get a new store each time.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
status=0
DIST_TRANSFORMER_CLOCK+=" torchrun=$EPOCHREALTIME"
trap '' USR1 TERM # before the fork: between a fork and its first command, a signal would end the child
(exec setsid "$python" -m torch.distributed.run \
  --nnodes "$NNODES" --nproc-per-node "$nproc" --max-restarts "$max_restarts" \
  --rdzv-backend c10d --rdzv-endpoint "$MASTER_ADDR:$MASTER_PORT" --rdzv-id "${RDZV_ID:-dist_transformer}" \
  --rdzv-conf "is_host=$is_host,join_timeout=$RDZV_TIMEOUT,read_timeout=$RDZV_TIMEOUT" --local-addr "$address" \
  --log-dir "$logs" --redirects "$redirects" -m dist_transformer train "${arguments[@]}" 2>"$logs/launcher.log") &
launcher=$!
forwarder=""
# shellcheck disable=SC2317  # the traps call it
stop() {
  [ -z "$forwarder" ] || return 0
  # Again and again, since ranks that are still importing, or being restarted, do not hear it yet.
  (trap '' USR1 TERM; while kill -0 "$launcher" 2>/dev/null; do pkill -USR1 -P "$launcher" || true; sleep 3; done) &
  forwarder=$!
  disown "$forwarder" # bash would report its end
}
trap stop USR1 TERM
trap 'stop; trap "kill -INT $launcher 2>/dev/null || true" INT' INT # the second time: at once
# A trapped signal ends `wait` early, so wait until the launcher is really gone.
while true; do
  wait "$launcher" && status=0 || status=$?
  kill -0 "$launcher" 2>/dev/null || break
done
[ -z "$forwarder" ] || kill -KILL "$forwarder" 2>/dev/null || true

if [ "$status" -ne 0 ]; then
  # The rank that failed first has the reason; the others only lost their peer. torchrun's log knows which it was.
  first=$(sed -n '/Root Cause/,$s/.*local_rank: \([0-9]*\).*/\1/p' "$logs/launcher.log" | tail -n 1)
  # What every rank found, rank 0 alone prints.
  reason=""
  for rank in "${first:-0}" 0; do
    [ -s "$reason" ] || reason=$(find "$logs" -path "*/$rank/stderr.log" -size +0 | sort | tail -n 1)
  done
  [ -s "$reason" ] || reason=$logs/launcher.log
  say "training ended with status $status; all output of its ranks is in $logs; the end of ${reason#"$logs/"}:" >&2
  tail -n 20 "$reason" >&2
fi
# The last lines are on their way; but not longer than 5 s, should a process that a rank left behind hold the pipe.
if [ -n "$tee" ]; then
  exec >&-
  for ((i = 0; i < 50; i++)); do kill -0 "$tee" 2>/dev/null || break; sleep 0.1; done
fi
exit "$status"
