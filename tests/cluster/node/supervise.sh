#!/bin/bash
# supervise.sh ID CACHE ROOT NETWORK BINDS
# Stands between the test process and the node, in a mount namespace and a session of its own. It starts the node's
# first process (init.sh), waits for its end, and takes away the control groups that Slurm made: the only thing in
# the kernel that outlives the node's namespaces. The node ends when standard input closes, so also when the tests
# are killed. Prints `pid N`, the first process as the host counts, for nsenter.
set -euo pipefail
id=$1 cache=$2 root=$3
here=$(dirname "$(readlink -f "$0")")

# Everything below is mounted in this namespace alone; the host's table never shows it.
mnt=$cache/mnt
mount -t tmpfs -o mode=755 tmpfs "$mnt"
mkdir "$mnt/upper" "$mnt/work" "$mnt/root" "$mnt/freezer"
mount -t overlay -o "lowerdir=$root,upperdir=$mnt/upper,workdir=$mnt/work" overlay "$mnt/root"
mount -t cgroup -o freezer cgroup "$mnt/freezer"

# Take away what a killed supervisor left: a group that no process is in, nor in its children.
for old in "$mnt"/freezer/cmrhpc-node-*; do
    if [ -e "$old" ] && ! read -r < "$old/cgroup.procs"; then find "$old" -depth -type d -exec rmdir {} + || true; fi
done

# Join a group of our own, which keeps it from being swept, and leave it at the end to remove it.
group=$mnt/freezer/cmrhpc-node-$id
home=$mnt/freezer$(sed -n 's/^[0-9]*:freezer://p' /proc/self/cgroup)
until mkdir -p "$group" && echo $$ > "$group/cgroup.procs"; do sleep 0.01; done
leave() {
    echo $$ > "$home/cgroup.procs"
    for _ in $(seq 100); do
        find "$group" -depth -type d -exec rmdir {} + 2>/dev/null || true
        [ -e "$group" ] || return 0
        sleep 0.1
    done
}
trap leave EXIT

namespaces=(--mount --pid --uts --ipc --fork)
[ "$NODE_NETWORK" = host ] || namespaces+=(--net)
# --kill-child and the death signal end the node should this script be killed.
setpriv --pdeathsig KILL unshare "${namespaces[@]}" --kill-child --propagation private \
    bash "$here/init.sh" "$mnt/root" "$group" <&0 &
outer=$!
until first=$(cat "/proc/$outer/task/$outer/children" 2>/dev/null) && [ -n "$first" ]; do
    kill -0 $outer
    sleep 0.01
done
echo "pid ${first% }"
wait $outer || true
