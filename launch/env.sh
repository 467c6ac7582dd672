# shellcheck shell=bash
# Environment of every rank; sourced by the scripts in launch/ and slurm/. Each line with its reason; edit for your cluster.

# One thread a rank unless the caller knows better: ranks that each start a thread per core slow each other down.
# node.sh gives the ranks of a node without GPUs their share of its cores.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# Fast tokenizers start threads of their own, and warn when a loader process forks after that.
export TOKENIZERS_PARALLELISM=false
# Python's output as it comes, so that the log's last line is the last thing that happened.
export PYTHONUNBUFFERED=1
# A failed collective ends its process instead of hanging it.
export TORCH_NCCL_ASYNC_ERROR_HANDLING="${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}"

# Several nodes, where the guesses of NCCL and gloo fail ("connection refused", a hang at the first collective): the
# interface through which nodes reach each other; `ip -br address` lists them. Gloo carries CPU ranks only.
# export NCCL_SOCKET_IFNAME=eth0
# export GLOO_SOCKET_IFNAME=eth0
# What NCCL chose (transport, rings, network), in each rank's log: the first thing to look at when nodes are slow.
# export NCCL_DEBUG=INFO
