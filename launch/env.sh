# Environment of every rank; sourced by local.sh and node.sh. Each line with its reason; edit for your cluster.

# One thread a rank unless the caller knows better: ranks that each start a thread per core slow each other down.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# Fast tokenizers start threads of their own, and warn when a loader process forks after that.
export TOKENIZERS_PARALLELISM=false
# Python's output as it comes, so that the log's last line is the last thing that happened.
export PYTHONUNBUFFERED=1
# A failed collective ends its process instead of hanging it.
export TORCH_NCCL_ASYNC_ERROR_HANDLING="${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}"
