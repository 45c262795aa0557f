#!/bin/bash
# task.sh STAGE WORKSPACE: one element of a job array runs the task of its index. The sbatch files beside it end in it.
#
#   CMRHPC_CONTAINER           run inside this image instead of the environment that the job was submitted from
#   CMRHPC_CONTAINER_OPTIONS   more words for `apptainer exec`, e.g. "--bind /scratch"
#
# The log is WORKSPACE/logs/STAGE_INDEX.log. The job ends with the exit code of the task. Asked by USR1 or USR2 to stop,
# the task saves a checkpoint and says 75, and the job goes back into the queue; after a TERM it does not: whoever sends
# that (scancel, preemption, the time limit) has decided already.
set -uo pipefail
umask 007
if [ $# -ne 2 ] || [ ! -d "$2" ]; then
    echo "usage: sbatch --array=0-9 slurm/STAGE.sbatch WORKSPACE (a folder)" >&2
    exit 2
fi
stage=$1
workspace=$(realpath "$2")
index=${SLURM_ARRAY_TASK_ID:-0}
command=(cmrhpc task "$workspace" --stage "$stage" --index "$index")

# Inside an image: it sees the workspace, a GPU where there is one, and its own checksum, which goes into the shard.
if [ -n "${CMRHPC_CONTAINER:-}" ]; then
    gpu=()
    [ ! -e /dev/nvidiactl ] || gpu=(--nv)
    read -r CMRHPC_CONTAINER_SHA256 _ < "$CMRHPC_CONTAINER.sha256" || echo "no checksum beside $CMRHPC_CONTAINER" >&2
    export CMRHPC_CONTAINER_SHA256
    # The options are words on purpose.
    # shellcheck disable=SC2206
    command=(apptainer --quiet exec "${gpu[@]}" --bind "$workspace" ${CMRHPC_CONTAINER_OPTIONS:-} "$CMRHPC_CONTAINER" "${command[@]}")
fi

# What the task says goes to its log. Slurm's own file keeps Slurm's own words; without any it is taken away.
slurm_file=$(readlink "/proc/$$/fd/1")
mkdir -p "$workspace/logs"
exec >> "$workspace/logs/${stage}_$index.log" 2>&1

# Slurm signals this script alone (--signal=B:USR2), so it is passed on. A signal cuts `wait` short: wait again.
"${command[@]}" &
child=$!
again=yes requeue=yes
trap 'again=yes; kill -USR2 $child' USR1 USR2
trap 'again=yes requeue=no; kill -USR2 $child' TERM
while [ $again = yes ]; do
    again=no
    wait $child
    code=$?
done

[ -s "$slurm_file" ] || rm -f "$slurm_file"
# A preempted job Slurm itself puts back; a second time would cost it its next run.
if [ "$code" -eq 75 ] && [ $requeue = yes ] && [[ $(scontrol show job "$SLURM_JOB_ID") = *PreemptTime=None* ]]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
