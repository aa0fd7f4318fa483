#!/bin/bash
# Run torchrun on one node of a job, and forward signals to the processes that it has started. See train.sbatch.
#
# SIGUSR1 would kill torchrun without stopping its processes, so torchrun ignores it. SIGTERM would leave them only 30
# seconds, so they get SIGUSR1 in its place. They write a checkpoint and end; then torchrun ends.

set -u
(
  trap '' USR1 # torchrun inherits this; its processes install their own handlers
  exec torchrun --nnodes "$SLURM_NNODES" --nproc_per_node "${NPROC:-gpu}" --max-restarts 0 \
    --rdzv_backend c10d --rdzv_endpoint "$RENDEZVOUS" --rdzv_id "$SLURM_JOB_ID" "$@"
) &
agent=$!
# Slurm may signal every process of the node. pkill inherits that both signals are ignored: otherwise it could die before
# it has forwarded one.
# shellcheck disable=SC2329 # the trap calls it
forward() {
  trap '' USR1 TERM
  pkill -USR1 -P "$agent"
  trap forward USR1 TERM
}
trap forward USR1 TERM
status=0
while kill -0 "$agent" 2>/dev/null; do
  wait "$agent"
  status=$?
done
exit "$status"
