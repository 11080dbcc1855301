#!/bin/bash
# A run on the nodes of a SLURM job but the last, which serves vLLM: sbatch docs/examples/cluster/slurm.sh <model> <teacher>
# The same sbatch goes on with a run that was stopped. Without servers: SERVERS=0 sbatch ... (rollouts by transformers).
#SBATCH --nodes=3
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --signal=TERM@180
#SBATCH --requeue
set -euo pipefail
MODEL=$1 TEACHER=$2 GPUS=8 SERVERS=${SERVERS:-1}
nodes=($(scontrol show hostnames "$SLURM_JOB_NODELIST"))
train=$((${#nodes[@]} - SERVERS))
engine=(generator=transformers)
if ((SERVERS)); then
  server=${nodes[-1]}
  VLLM_SERVER_DEV_MODE=1 srun --overlap --nodes=1 --ntasks=1 --nodelist="$server" vllm serve "$MODEL" --host "$server" --port 8000 \
    --data-parallel-size $GPUS --dtype bfloat16 --skip-tokenizer-init --logprobs-mode processed_logprobs --enable-scale-out \
    --weight-transfer-config '{"backend": "nccl"}' &
  engine=(generator=vllm_server "generator.urls=[http://$server:8000]" generator.transfer=nccl
    "generator.address=${nodes[0]}" generator.patience=1800)
fi
# One task per GPU. --kill-on-bad-exit ends all tasks where one is lost; none waits for it until a timeout.
MASTER_ADDR=${nodes[0]} srun --overlap --kill-on-bad-exit=1 --nodes=$train --ntasks-per-node=$GPUS \
  --nodelist="$(IFS=,; echo "${nodes[*]:0:train}")" python -m opd_lightning method=opd model.path="$MODEL" teacher.path="$TEACHER" \
  task=gsm8k trainer=fsdp2 trainer.devices=$GPUS trainer.num_nodes=$train trainer.precision=bf16-mixed data.batch_size=$((64 * train)) \
  "${engine[@]}" "${@:3}"
