#!/usr/bin/env bash
# One rank, as a task of srun: see slurm/train_srun.sbatch. Rank 0 is shown and kept, the others are kept.
#   srun launch/rank.sh CONFIG.yaml [section.key=value ...]
# It needs MASTER_ADDR and MASTER_PORT; Slurm's variables say which rank this is. DIST_TRANSFORMER_LOGS: folder of the logs.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export DIST_TRANSFORMER_CLOCK="${DIST_TRANSFORMER_CLOCK:-} rank.sh=$EPOCHREALTIME"
rank=${SLURM_PROCID:?rank.sh is started by srun, one task a rank}
python=${PYTHON:-$here/../.venv/bin/python}
[ -x "$python" ] || python=$(command -v python3)
# shellcheck source=launch/env.sh
source "$here/env.sh"
logs=${DIST_TRANSFORMER_LOGS:?the folder of the logs}
mkdir -p "$logs"
# Slurm signals every process of a step: what keeps the lines must outlive the rank that saves, and a rank that is still
# importing must not die of it.
trap '' USR1 TERM
if [ "$rank" -eq 0 ]; then
  exec > >(exec tee -a "$logs/rank-0.log") 2>&1
else
  exec >>"$logs/rank-$rank.log" 2>&1
fi
exec "$python" -m dist_transformer train "$@"
