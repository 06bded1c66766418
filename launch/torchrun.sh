#!/usr/bin/env bash
# torchrun for dist-reg, on this node alone or as one node of many; run it on every node.
#
#   launch/torchrun.sh train RUN.yaml key=value ...
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=first-node launch/torchrun.sh train ...                  static: nodes say their rank
#   NNODES=1:4 RDZV_ENDPOINT=first-node:29400 RDZV_ID=mine launch/torchrun.sh train ...       elastic: nodes come and go
#
# From the environment: NPROC (processes here; every GPU, else 1), NNODES, and for
#   static   NODE_RANK, MASTER_ADDR, MASTER_PORT (29500)
#   elastic  RDZV_ENDPOINT, RDZV_ID, MAX_RESTARTS (3); what restarts resumes from the newest checkpoint
# SIGUSR1 or SIGTERM saves the run and ends with exit code 75; the same command goes on from there.
set -euo pipefail

python=${PYTHON:-python}
nnodes=${NNODES:-1}
nproc=${NPROC:-$("$python" -c 'import torch; print(torch.cuda.device_count() or 1)')}
cores=$(getconf _NPROCESSORS_ONLN)
# torchrun would set 1; the noise kernels of the CPU, and the optimizer under offload, use the threads.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores / nproc > 0 ? cores / nproc : 1))}

rendezvous=(--nnodes "$nnodes" --nproc-per-node "$nproc")
if [[ -n ${RDZV_ENDPOINT:-} ]]; then
    : "${RDZV_ID:?names the run, the same on every node}"
    rendezvous+=(--rdzv-backend c10d --rdzv-endpoint "$RDZV_ENDPOINT" --rdzv-id "$RDZV_ID")
    rendezvous+=(--max-restarts "${MAX_RESTARTS:-3}")
    # torchrun's own store outlives a restart, and workers would find the addresses of those before them in it.
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
elif [[ $nnodes == 1 ]]; then
    rendezvous+=(--standalone)
else
    : "${NODE_RANK:?is the number of this node, from 0}" "${MASTER_ADDR:?is the first node}"
    rendezvous+=(--node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29500}")
fi
# The agent is torchrun with --signals-to-handle and --shutdown-timeout set, and with an end that can be read.
exec "$python" -m dist_reg.launch.agent "${rendezvous[@]}" -m dist_reg "$@"
