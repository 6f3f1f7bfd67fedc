#!/bin/bash
# One run on several machines: sbatch launch/slurm.sh recipes/YOURS.yaml   (from the repository's root)
#SBATCH --job-name=recover
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@300
#SBATCH --requeue
set -euo pipefail

recipe=${1:?usage: sbatch launch/slurm.sh RECIPE}
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
gpus=${SLURM_GPUS_ON_NODE:-8}

# TERM comes five minutes before the time limit: the run writes a checkpoint and stops; the same command goes on from it.
srun --kill-on-bad-exit=1 bash -c "exec accelerate launch \
  --config_file launch/multi_node.yaml \
  --num_machines $SLURM_NNODES \
  --num_processes $((SLURM_NNODES * gpus)) \
  --machine_rank \$SLURM_NODEID \
  --main_process_ip $first \
  -m recover run '$recipe'" &
work=$!
trap 'kill -TERM "$work"; wait "$work"' TERM
wait "$work"
