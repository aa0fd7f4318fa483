#!/bin/bash
# One node of a job: torchrun, and what passes signals on to the processes that it has started. See train.sbatch.
#
# torchrun itself would end at SIGUSR1 without a word to its processes, and would give them 30 seconds at SIGTERM: so it
# ignores the first, and for the second its processes get the first. They write a checkpoint and end, and so does it.

set -u
(
  trap '' USR1 # torchrun inherits it; its processes set handlers of their own
  exec torchrun --nnodes "$SLURM_NNODES" --nproc_per_node "${NPROC:-gpu}" --max-restarts 0 \
    --rdzv_backend c10d --rdzv_endpoint "$RENDEZVOUS" --rdzv_id "$SLURM_JOB_ID" "$@"
) &
agent=$!
# Slurm may signal every process of the node, pkill too, which would end before it has passed anything on: so it inherits
# that the signals are ignored.
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
