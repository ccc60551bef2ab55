#!/bin/bash
# An experiment on SLURM: sbatch experiments/devices/slurm.sh experiments/shapes/emf.yaml [further options]
# Lightning finds nodes and ranks in SLURM's environment; srun starts one task a GPU, nothing else launches anything.
#SBATCH --job-name=emf
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8  # as many as GPUs: each task is a rank
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8  # a rank and the data workers it starts (data.num_workers)
#SBATCH --time=24:00:00
#SBATCH --signal=SIGUSR1@120  # two minutes before the end Lightning saves, requeues the job and goes on from there
#SBATCH --requeue

set -euo pipefail
experiment=${1:?usage: sbatch experiments/devices/slurm.sh EXPERIMENT.yaml [options]}
shift

srun emf fit --config "$experiment" --config experiments/devices/ddp.yaml \
    --trainer.num_nodes "$SLURM_NNODES" --trainer.devices "$SLURM_NTASKS_PER_NODE" "$@"

# Sharded instead: experiments/devices/fsdp2.yaml above, and
#   --trainer.strategy.init_args.data_parallel_size "$SLURM_NTASKS"
