#!/usr/bin/env bash
# Train on the machines of a list, over ssh: starts launch/node.sh on each of them.
#   launch/hosts.sh HOSTFILE CONFIG.yaml [--max-restarts N] [section.key=value ...]
# launch/hostfile.example says what HOSTFILE looks like. Variables of launch/node.sh (MASTER_PORT, RDZV_TIMEOUT, NNODES=MIN:MAX)
# are passed on. SSH: the command that reaches a machine [ssh -o BatchMode=yes].
# ctrl-C, SIGTERM or SIGUSR1: the ranks save and end; the same command goes on from there.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
say() { echo "hosts.sh: $*"; }
refuse() { say "$*" >&2; exit 2; }
case ${1:-} in -h | --help) sed -n '2,6s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;; esac
[ $# -ge 2 ] || refuse "usage: launch/hosts.sh HOSTFILE CONFIG.yaml [options] (see launch/hosts.sh --help)"
hostfile=$1
shift
[ -f "$hostfile" ] || refuse "$hostfile: no such file"

hosts=() slots=()
while read -r host rest || [ -n "$host" ]; do
  case $host in '' | '#'*) continue ;; esac
  case $rest in
    '' | '#'*) slots+=("") ;;
    slots=*) rest=${rest%%[[:space:]]*}; slots+=("${rest#slots=}") ;;
    *) refuse "$hostfile: \"$host $rest\" is not a host, nor a host with slots=N" ;;
  esac
  hosts+=("$host")
done <"$hostfile"
[ ${#hosts[@]} -gt 0 ] || refuse "$hostfile names no host"

python=${PYTHON:-$here/../.venv/bin/python}
[ -x "$python" ] || python=$(command -v python3) || refuse "there is no Python: run make setup, or set PYTHON"
overrides=()
for argument in "$@"; do case $argument in *=* | *.yaml | *.yml) case $argument in -*) ;; *) overrides+=("$argument") ;; esac ;; esac; done
run_dir=$("$python" -m dist_transformer config "${overrides[@]}" --field run.dir) || exit $?

read -r -a ssh <<<"${SSH:-ssh -o BatchMode=yes}"
pids=()
trap '' USR1 TERM INT # until there is something to stop; ctrl-C would end each ssh, and leave its ranks alone
for i in "${!hosts[@]}"; do
  variables=("MASTER_ADDR=${hosts[0]}" "NNODES=${NNODES:-${#hosts[@]}}" "NODE_RANK=$i" "PYTHON=$python")
  [ -z "${slots[i]}" ] || variables+=("NPROC=${slots[i]}")
  for name in MASTER_PORT RDZV_ID RDZV_TIMEOUT; do [ -z "${!name:-}" ] || variables+=("$name=${!name}"); done
  # Quoted here for the shell over there.
  printf -v command 'cd %q && exec env' "$PWD"
  for word in "${variables[@]}" "$here/node.sh" "$@"; do printf -v command '%s %q' "$command" "$word"; done
  "${ssh[@]}" "${hosts[i]}" "$command" </dev/null &
  pids+=($!)
done

stopper=""
# shellcheck disable=SC2317  # the traps call it
stop() {
  [ -z "$stopper" ] || return 0
  say "asking all ranks to save and end ($run_dir/STOP)"
  # Again and again: a start takes away what was meant for an earlier one.
  (while kill -0 $$ 2>/dev/null; do touch "$run_dir/STOP" 2>/dev/null || true; sleep 3; done) &
  stopper=$!
  disown "$stopper"
}
trap stop USR1 TERM INT
status=0
for i in "${!hosts[@]}"; do
  while true; do # a trapped signal ends `wait` early
    wait "${pids[i]}" && ended=0 || ended=$?
    kill -0 "${pids[i]}" 2>/dev/null || break
  done
  [ "$ended" -eq 0 ] || { say "${hosts[i]} ended with status $ended" >&2; [ "$status" -ne 0 ] || status=$ended; }
done
if [ -n "$stopper" ]; then
  kill -KILL "$stopper" 2>/dev/null || true
  rm -f "$run_dir/STOP"
fi
exit "$status"
