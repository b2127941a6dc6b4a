#!/usr/bin/env bash
# Learn a recipe's stream on SLURM, one process a GPU; the job is put back into the queue when its time runs out.
#
# run:    sbatch recipes/slurm/train.sh RECIPE RUN_FOLDER [KEY=VALUE ...]
# result: none yet; checked with shellcheck and a stub of srun (tests/test_slurm.py), not on a cluster
#
# Three minutes before the end SLURM sends SIGUSR1 to every rank. They save the task in its middle and exit with 75, and
# the job goes on from there when it is started again. Resume needs as many processes as before: do not change --ntasks.
# The run folder must lie where all nodes see it.
#SBATCH --job-name=hf-cl
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=2
#SBATCH --gpus-per-node=2
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --signal=USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

if [[ $# -lt 2 ]]; then
    echo "usage: sbatch $0 RECIPE RUN_FOLDER [KEY=VALUE ...]" >&2
    exit 2
fi
recipe=$1 run=$2
shift 2

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
MASTER_ADDR=${nodes[0]}
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT

code=0
# Each task of the step is one rank; `exec` leaves no shell in between that would take the signal. With
# --kill-on-bad-exit a dead rank ends the others at once. The variables are the step's own: not expanded here.
# shellcheck disable=SC2016
srun --kill-on-bad-exit=1 bash -c '
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
    exec hf-cl train "$@"
' rank "$recipe" --resume --output-dir "$run" "$@" || code=$?

case $code in
    0) ;;
    75 | 138) # 138: SIGUSR1 came before there was anything to save
        echo "put back into the queue after exit code $code"
        scontrol requeue "$SLURM_JOB_ID"
        ;;
    *) exit "$code" ;;
esac
