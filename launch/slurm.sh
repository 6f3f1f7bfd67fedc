#!/bin/bash
# One run on several machines, from the repository's root: sbatch launch/slurm.sh recipes/YOURS.yaml [KEY=VALUE ...]
# Other launch files: sbatch --export=ALL,CONFIG=launch/YOURS.yaml launch/slurm.sh ...
#SBATCH --job-name=recover
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@300
#SBATCH --requeue
set -euo pipefail

: "${1:?usage: sbatch launch/slurm.sh RECIPE [KEY=VALUE ...]}"
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
first=${hosts%%$'\n'*} # a pipe into head would end this script where scontrol is still writing
gpus=${SLURM_GPUS_ON_NODE:-8}
launch=(
  accelerate launch
  --config_file "${CONFIG:-launch/multi_node.yaml}"
  --num_machines "$SLURM_NNODES"
  --num_processes "$((SLURM_NNODES * gpus))"
  --main_process_ip "$first"
  --main_process_port "$((20000 + SLURM_JOB_ID % 10000))" # two jobs may share a machine
)

# TERM comes five minutes before the time limit: the run writes a checkpoint and stops; the same command goes on from it.
# The rank is known on each machine only, so its variable is left to the shell there; all else is quoted here.
srun --kill-on-bad-exit=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" bash -c \
  "exec ${launch[*]@Q} --machine_rank \"\$SLURM_NODEID\" -m recover run ${*@Q}" &
work=$!
trap 'kill -TERM "$work"; wait "$work"' TERM
wait "$work"
