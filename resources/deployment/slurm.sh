#!/bin/bash
# One experiment as a Slurm job that continues in the queue when its time is up: sbatch slurm.sh
# Fill in what your cluster asks for (partition, account), and the two paths below. The home has to lie on a disk that all nodes see.
# One node at a time works in it. Where its file system has no locks (SQLite asks for them), name a PostgreSQL database in the settings,
# under storage.dagster_database. The cache of models (~/.cache, or XDG_CACHE_HOME) has to be seen by all nodes, too.
#SBATCH --job-name=synpo
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=8
#SBATCH --mem=64G
#SBATCH --time=08:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=synpo-%j.log
# Five minutes before the end of its time, this script (B:) gets USR1.
#SBATCH --signal=B:USR1@300
set -u
synpo=${SYNPO:-$HOME/synpo/.venv/bin/synpo}
home=${SYNPO_HOME:-$HOME/runs/mine}

stop() {
    run=$(jobs -p)
    [ -z "$run" ] || { kill -TERM "$run" && wait "$run"; }
}
# The time is up: what is unfinished goes on from its shards and saved training states.
trap 'stop; scontrol requeue "$SLURM_JOB_ID"; exit 0' USR1
# Somebody cancelled it, or Slurm preempts it and requeues it by itself.
trap 'stop; exit 143' TERM

# In the background, so that a signal is answered at once: it interrupts `wait` alone.
"$synpo" run --home "$home" --iterations "${ITERATIONS:-4}" &
wait "$!"
