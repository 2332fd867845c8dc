#!/usr/bin/env bash
# CoLLiE on four nodes of eight GPUs: sbatch examples/slurm.sh run.yaml runs/NAME [key=value ...]
#SBATCH --job-name=collie
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-task=1
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue

# Five minutes before the end Slurm sends USR1: the run saves a checkpoint and leaves, and the requeued job goes on from
# it. Ranks and the machine where they meet are found from what srun sets.
set -euo pipefail
config=$1 folder=$2
shift 2
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}

srun --kill-on-bad-exit=1 collie train "$config" "train.output_dir=$folder" \
  checkpoint.save_steps=500 checkpoint.resume_from_checkpoint=auto "$@"

if grep -q '"outcome": "stopped early: SIG' "$folder/summary.json"; then
  scontrol requeue "$SLURM_JOB_ID"
fi
