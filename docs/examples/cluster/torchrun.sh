#!/bin/bash
# One node of a run; the same on each, with the address of the first, in a folder that all see:
#   docs/examples/cluster/torchrun.sh <number of nodes> <this node, from 0> <processes per node> <first node>:<port> [override ...]
# Served rollouts: start vllm serve on another machine (docs/engines.md), and give generator=vllm_server generator.urls=[...].
set -euo pipefail
exec "${PYTHON:-python}" -m torch.distributed.run --nnodes "$1" --node-rank "$2" --nproc-per-node "$3" --rdzv-endpoint "$4" \
  -m opd_lightning trainer=ddp trainer.num_nodes="$1" trainer.devices="$3" "${@:5}"
