# shellcheck shell=bash
# What the batch scripts share: a step that is told in time to save, and the decision whether the job goes on.
# Sourced by train.sbatch and train_srun.sbatch, which set `root` and `arguments`.

say() { echo "$(basename "${SCRIPT_NAME:-job}"): $(date +%H:%M:%S) $*"; }
ask_slurm() { job_line=$(scontrol -o show job "$SLURM_JOB_ID"); }
job_field() { tr ' ' '\n' <<<"$job_line" | sed -n "s/^$1=//p" | head -n 1; }
job_time() { date -d "$(job_field "$1")" +%s 2>/dev/null || true; } # in seconds since 1970; nothing where it is unlimited

# Finds Python and the run directory, and checks the configuration: a mistake is one sentence, before any node starts.
prepare_job() {
  local began=$EPOCHREALTIME
  ask_slurm
  # When each part of the start began: see RUN_DIR/startup.jsonl.
  export DIST_TRANSFORMER_CLOCK
  DIST_TRANSFORMER_CLOCK="queue=$(job_time SubmitTime) prolog=$(job_time StartTime) batch_script=$began"
  python=${PYTHON:-$root/.venv/bin/python}
  [ -x "$python" ] || python=$(command -v python3)
  export PYTHON=$python
  [ ${#arguments[@]} -gt 0 ] || { say "usage: sbatch [options] $SCRIPT_NAME CONFIG.yaml [section.key=value ...]" >&2; exit 2; }
  # Of an array, each job is a run of its own seed.
  local seed=() answer
  if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then seed=(--array-task "$SLURM_ARRAY_TASK_ID"); fi
  run_dir="" max_restarts="" n_ends="" checkpoint="" finished=""
  answer=$("$python" -m dist_transformer job begin ${seed[@]+"${seed[@]}"} "${arguments[@]}")
  eval "$answer"
  if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then arguments+=("run.seed=$SLURM_ARRAY_TASK_ID" "run.dir=$run_dir"); fi
  if [ -n "$finished" ]; then
    say "$run_dir is finished: $finished"
    exit 0
  fi
  # launch/node.sh need not read the configuration again.
  export DIST_TRANSFORMER_RUN_DIR=$run_dir
  MASTER_ADDR=$("$root/launch/node.sh" --head-address)
  export MASTER_ADDR
  # Not every Slurm tells the ranks when the job's time is up: whether a signal was the time limit's (see exits.jsonl).
  if [ -z "${SLURM_JOB_END_TIME:-}" ]; then
    SLURM_JOB_END_TIME=$(job_time EndTime)
    export SLURM_JOB_END_TIME
  fi
  say "job $SLURM_JOB_ID, restart ${SLURM_RESTART_COUNT:-0}, nodes $SLURM_JOB_NODELIST, ${checkpoint:-no checkpoint yet}, run directory $run_dir"
}

# run_step COMMAND...: runs srun, and asks all ranks to save when this job is told to stop.
# srun runs in the background, since bash hears a signal only between foreground commands. It would die of an early USR1,
# so it starts with it ignored; once it has nodes, it passes it on all the same. (TERM would make it kill all tasks.)
run_step() {
  # One task may be many ranks: it may use all of the job's cores there. (Without such a plugin nothing is bound.)
  case $(scontrol show config | sed -n 's/^TaskPlugin *= *//p') in *affinity* | *cgroup*) export SLURM_CPU_BIND=none ;; esac
  DIST_TRANSFORMER_CLOCK+=" srun=$EPOCHREALTIME"
  trap '' USR1 TERM
  (exec "$@") &
  step=$!
  signal=""
  trap 'stop USR1' USR1
  trap 'stop TERM' TERM
  status=0
  while true; do # a trapped signal ends `wait` early
    wait "$step" && status=0 || status=$?
    kill -0 "$step" 2>/dev/null || break
  done
}

# shellcheck disable=SC2317  # the traps call it
stop() {
  [ -z "$signal" ] || return 0
  signal=$1
  say "got SIG$signal: asking all ranks to save"
  # Again and again: a step that has only just started does not hear it yet.
  (trap '' USR1 TERM; while kill -USR1 "$step" 2>/dev/null; do sleep 10; done) &
}

# Puts the job back into the queue, without nodes that are not fit; returns only where Slurm refuses.
requeue() {
  # From here on, Slurm ends this shell when it likes; it leaves it a few seconds.
  trap '' TERM USR1
  scontrol requeue "$SLURM_JOB_ID" || return 0
  if [ -s "$run_dir/excluded_nodes" ]; then
    scontrol update "JobId=$SLURM_JOB_ID" "ExcNodeList=$(paste -sd, "$run_dir/excluded_nodes")" || true
  fi
  exit 0
}

# Requeues the job where that makes sense, and ends.
end_job() {
  # A job that was cancelled stays so; one that reached its limit while it saved does not.
  local state reason preempted answer verdict why
  ask_slurm
  state=$(job_field JobState)
  reason=$(job_field Reason)
  preempted=$(job_field PreemptTime)
  answer=$("$python" -m dist_transformer job end "$run_dir" --limit "$max_restarts" --n-ends "$n_ends")
  eval "$answer"
  case $verdict in
    finished)
      say "finished: $checkpoint, $why"
      exit "$status" ;;
    not_begun)
      # A sentence for a person would only come again; a port that was taken or a file system that hung need not.
      if [ "$state" = RUNNING ] && [ "${SLURM_RESTART_COUNT:-0}" = 0 ] &&
        ! grep -rqs '^dist-transformer: ' "$run_dir/logs/job-$SLURM_JOB_ID.0"; then
        say "ended with status $status before training began: requeueing, once"
        requeue
      fi
      say "ended with status $status before training began: not requeued; see above, and $run_dir/logs" >&2
      exit $((status == 0 ? 1 : status)) ;;
  esac
  if [ "$state" != RUNNING ] && [ "$reason" != TimeLimit ]; then
    say "cancelled (${state,,}) at $checkpoint: the same sbatch command goes on"
  # Ranks that were signalled by hand, and not by Slurm through this shell or for preemption.
  elif [ -z "$signal" ] && { [ -z "$preempted" ] || [ "$preempted" = None ]; } && [ "$status" -eq 0 ]; then
    say "stopped by hand at $checkpoint: the same sbatch command goes on"
  elif [ "$verdict" = stop ]; then
    say "not requeued: $why; see $run_dir/exits.jsonl and $run_dir/logs" >&2
    [ "$status" -ne 0 ] || status=1
  else
    say "requeueing ($why), at ${checkpoint:-the start}"
    requeue
    say "could not be requeued: the next job of a chain, or the same sbatch command, goes on" >&2
    [ "$status" -ne 0 ] || status=1
  fi
  exit "$status"
}
