#!/bin/bash
# task.sh STAGE WORKSPACE [OFFSET]: one element of a job array runs the task of its index. The sbatch files and `cmrhpc submit`
# end in it.
#
#   CMRHPC_CONTAINER           run inside this image instead of the environment that the job was submitted from
#   CMRHPC_CONTAINER_OPTIONS   more words for `apptainer exec`, e.g. "--bind /scratch"
#   CMRHPC_OFFSET              the same as OFFSET: added to the array index, where the cluster allows none as high as the task's
#   CMRHPC_TASKS               run these tasks side by side, e.g. "4 5", instead of that of the array index
#
# The log of each is WORKSPACE/logs/STAGE_INDEX.log. The job ends with the exit code of its task, or with the worst. Asked
# by USR1 or USR2 to stop, a task that trains saves a checkpoint and says 75, and the job goes back into the queue; after a
# TERM it does not: whoever sends that (scancel, preemption, the time limit) has decided already.
set -uo pipefail
umask 007

# Slurm signals this script alone (--signal=B:USR2), or cmrhpc submit passes its signal on: so it is passed on to the tasks.
children=()
asked=no again=no requeue=yes
stop() {
    asked=yes again=yes
    [ ${#children[@]} -eq 0 ] || kill -USR2 "${children[@]}" 2> /dev/null
}
trap stop USR1 USR2
# These keep nothing, and would begin anew for ever: they run into the time limit, and the next submission asks for more.
[[ ${1:-} != @(ingest|aggregate) ]] || { requeue=no; trap again=yes USR1 USR2; }
trap 'requeue=no; stop' TERM

offset=${3:-${CMRHPC_OFFSET:-0}}
if [ $# -lt 2 ] || [ $# -gt 3 ] || [ ! -d "$2" ] || [[ ! $offset =~ ^[0-9]+$ ]]; then
    echo "usage: sbatch --array=0-9 slurm/STAGE.sbatch WORKSPACE [OFFSET] (a folder, a number)" >&2
    exit 2
fi
stage=$1
workspace=$(realpath "$2")
if [ -z "${CMRHPC_TASKS:-}${SLURM_ARRAY_TASK_ID:-}" ] && [[ $stage != @(ingest|aggregate) ]]; then
    echo "which task of $stage? sbatch had an empty --array, perhaps because nothing is missing" >&2
    exit 2
fi
# No here-string: before bash 5.1 it is a temporary file, and a full /tmp would leave no task.
# shellcheck disable=SC2206
tasks=(${CMRHPC_TASKS:-$((${SLURM_ARRAY_TASK_ID:-0} + 10#$offset))})
if [ ${#tasks[@]} -eq 0 ]; then
    echo "which task of $stage? CMRHPC_TASKS names none" >&2
    exit 3
fi
command=(cmrhpc task "$workspace" --stage "$stage")

# Inside an image: it sees the workspace, a GPU where there is one, and its own checksum, which goes into the shard.
if [ -n "${CMRHPC_CONTAINER:-}" ]; then
    case $workspace in *[,:]*)
        echo "Apptainer cannot bind a path with , or : ($workspace): rename the folder" >&2
        exit 3
        ;;
    esac
    gpu=()  # empty, it is an unset variable to bash before 4.4
    [ ! -e /dev/nvidiactl ] || gpu=(--nv)
    read -r CMRHPC_CONTAINER_SHA256 _ < "$CMRHPC_CONTAINER.sha256" || echo "no checksum beside $CMRHPC_CONTAINER" >&2
    export CMRHPC_CONTAINER_SHA256
    # The options are words on purpose.
    # shellcheck disable=SC2206
    command=(apptainer --quiet exec ${gpu[@]+"${gpu[@]}"} --bind "$workspace" ${CMRHPC_CONTAINER_OPTIONS:-} "$CMRHPC_CONTAINER" "${command[@]}")
fi

# What a task says goes to its log. Slurm's own file keeps Slurm's own words; without any it is taken away.
logs=$workspace/logs
if [ ! -e "$logs" ] && mkdir "$logs" 2> /dev/null; then  # group and access as the workspace has them, none for others
    if chgrp --reference="$workspace" "$logs" 2> /dev/null; then
        chmod --reference="$workspace" "$logs" && chmod u+rwx,g+s,o= "$logs"
    else
        chmod u=rwx,go= "$logs"
    fi
fi
for index in "${tasks[@]}"; do
    log=$logs/${stage}_$index.log
    if [ -L "$logs" ] || [ -L "$log" ] || { [ -e "$log" ] && [ ! -f "$log" ]; }; then
        echo "$log is reached by a link, or is not a plain file: remove it, then submit again" >&2
        exit 3
    fi
    if ! : >> "$log"; then  # bash says why
        echo "the log of the task cannot be written: free space, or give yourself write access to $logs" >&2
        exit 3
    fi
done
for index in "${tasks[@]}"; do
    "${command[@]}" --index "$index" >> "$workspace/logs/${stage}_$index.log" 2>&1 &
    children+=($!)
done
[ $asked = no ] || stop  # asked while they started

# A signal cuts `wait` short: wait again.
worst=0 checkpointed=no
for i in "${!children[@]}"; do
    again=yes
    while [ $again = yes ]; do
        again=no
        wait "${children[i]}" 2> /dev/null
        code=$?
    done
    case $code in
        0) ;;
        # 138 and 140: the signal came before the task could listen, so there is nothing that it could have lost.
        75 | 138 | 140) checkpointed=yes ;;
        *)
            [ $code -gt $worst ] && worst=$code
            [ $code -le 128 ] || echo "ended by signal $((code - 128))" >> "$workspace/logs/${stage}_${tasks[i]}.log"
            ;;
    esac
done

slurm_file=$(readlink "/proc/$$/fd/1")
[ -s "$slurm_file" ] || [ ! -f "$slurm_file" ] || rm -f "$slurm_file"
if [ $checkpointed = yes ]; then
    # SLURM_JOB_ID of one element is the number of the whole array: all of it, what has ended too, would go back.
    job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
    job=${job:-${SLURM_JOB_ID:-}}
    # A preempted job Slurm itself puts back; a second time would cost it its next run.
    if [ $requeue = yes ] && [ -n "$job" ]; then
        for pause in 2 5 10 0; do  # a controller that is being restarted
            told=$(scontrol show job "$job" 2> /dev/null) && break
            sleep $pause
        done
        if [ -z "$told" ]; then
            echo "Slurm does not answer, so job $job is not requeued: submit it again" >&2
        elif [[ $told = *PreemptTime=None* ]]; then
            scontrol requeue "$job"
        fi
    fi
    [ $worst -ne 0 ] || worst=75
fi
exit $worst
