#!/usr/bin/env bash
# Train on this machine: one rank for each GPU, or CPU ranks.
#   launch/local.sh CONFIG.yaml [--nproc N] [--max-restarts N] [section.key=value ...]
# Rank 0 is shown; every rank writes a log file under RUN_DIR/logs, and the first error of any rank is shown at the end.
# --nproc N: ranks [this machine's GPUs; 1 where there are none]. --max-restarts N: start again where a rank fails [0].
# ctrl-C, SIGTERM or SIGUSR1: the ranks save and end; the same command goes on from there.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
for argument in "$@"; do
  case $argument in -h | --help) sed -n '2,6s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;; esac
done
python=${PYTHON:-$here/../.venv/bin/python}
[ -x "$python" ] || python=python3
# One node that meets only itself, at a port that is free.
MASTER_PORT=$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
export MASTER_PORT MASTER_ADDR=127.0.0.1 NNODES=1 NODE_RANK=0 RDZV_ID=local LAUNCHER=local.sh
exec "$here/node.sh" "$@"
