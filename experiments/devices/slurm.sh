#!/bin/bash
# An experiment on SLURM: sbatch experiments/devices/slurm.sh shapes/emf [further options]
# Lightning finds nodes and ranks in SLURM's environment; srun starts one task a GPU, nothing else launches anything.
# EMF is the command: emf of an environment, or a container's (docs/how_to/clusters.md):
#   EMF="apptainer exec --nv emf.sif emf" sbatch experiments/devices/slurm.sh shapes/emf
#SBATCH --job-name=emf
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8  # as many as GPUs: each task is a rank
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8  # a rank and the data workers it starts (data.num_workers)
#SBATCH --time=24:00:00
#SBATCH --signal=SIGUSR1@120  # two minutes before the end Lightning saves, requeues the job and goes on from there
#SBATCH --requeue

set -euo pipefail
experiment=${1:?usage: sbatch slurm.sh EXPERIMENT [options]}
shift

# a rank that ends alone would leave the others waiting for it until a time-out: srun ends them at once
# shellcheck disable=SC2086  # EMF is a command with its arguments
srun --kill-on-bad-exit=1 ${EMF:-emf} fit --config "$experiment" --config devices/ddp "$@" \
    --trainer.num_nodes "$SLURM_NNODES" --trainer.devices "$SLURM_NTASKS_PER_NODE"  # last: what SLURM gives holds

# Sharded instead: devices/fsdp2 above, and
#   --trainer.strategy.init_args.data_parallel_size "$SLURM_NTASKS"
