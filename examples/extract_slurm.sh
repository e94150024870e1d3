#!/bin/bash
# Extract a folder of slides with a SLURM job array: sbatch examples/extract_slurm.sh SLIDES JOB [more options]
#
# Each task of the array begins with its own share of the slides (--shard is taken from SLURM_ARRAY_TASK_ID and _COUNT)
# and then helps the others. All work on one job folder, which all nodes must see; lock files keep two of them from one
# slide. A task that is preempted or killed loses the slides in its hands only: the others take them over, and
# submitting the array again goes on where it stopped. summary.csv tells what became of each slide.
#
#SBATCH --job-name=ssmamba-extract
#SBATCH --array=0-7
#SBATCH --gpus-per-task=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=32G
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --output=extract_%A_%a.log

set -euo pipefail
slides=${1:?"the first argument is the folder of slides"}
job=${2:?"the second argument is the job folder, on a disk that all nodes see"}

# exec: SLURM's SIGTERM reaches ssmamba itself, which then gives its slides back.
exec ssmamba extract "$slides" --out "$job" --model ssmamba_small --pretrained --mpp 0.5 --tile-size 224 \
    --batch-size 128 --workers "${SLURM_CPUS_PER_TASK:-4}" --precision auto "${@:3}"
