#!/usr/bin/env bash
# One node, every GPU (or NPROC processes):  launch/torchrun.sh train RUN.yaml key=value ...
set -euo pipefail
nproc=${NPROC:-$(python -c 'import torch; print(torch.cuda.device_count() or 1)')}
cores=$(getconf _NPROCESSORS_ONLN)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores / nproc > 0 ? cores / nproc : 1))}
exec torchrun --standalone --nproc-per-node "$nproc" -m dist_reg "$@"
