#!/bin/bash
# init.sh ROOT GROUP
# The node's first process, in fresh namespaces: furnishes ROOT, moves into it, starts the daemons, prints `ready` and
# waits for the end of standard input. When it ends, the kernel ends every process of the node.
# NODE_NETWORK private|host, NODE_SLURM and NODE_ACCOUNTING yes|no, NODE_BINDS lines of SOURCE<tab>TARGET<tab>rw|ro.
set -euo pipefail
root=$1 group=$2

# Kernel file systems of the node's own. Of the control groups it sees one branch of the freezer.
mount -t proc proc "$root/proc"
mount -t sysfs sysfs "$root/sys"
mount -t tmpfs -o mode=755 tmpfs "$root/sys/fs/cgroup"
mkdir "$root/sys/fs/cgroup/freezer"
mount --bind "$group" "$root/sys/fs/cgroup/freezer"

# Devices: a few real ones, and two that pass for GPUs (Slurm wants character devices).
mount -t tmpfs -o mode=755 tmpfs "$root/dev"
while read -r name major minor; do
    mknod -m 666 "$root/dev/$name" c "$major" "$minor"
done <<'DEVICES'
null 1 3
zero 1 5
full 1 7
random 1 8
urandom 1 9
tty 5 0
fuse 10 229
fakegpu0 1 3
fakegpu1 1 3
DEVICES
mkdir "$root/dev/pts" "$root/dev/shm"
mount -t devpts -o newinstance,mode=620,ptmxmode=0666 devpts "$root/dev/pts"
mount -t tmpfs -o mode=1777 tmpfs "$root/dev/shm"
ln -s pts/ptmx "$root/dev/ptmx"
ln -s /proc/self/fd "$root/dev/fd"
for i in 0:stdin 1:stdout 2:stderr; do ln -s "/proc/self/fd/${i%:*}" "$root/dev/${i#*:}"; done

# What the host lends.
while IFS=$'\t' read -r source target mode; do
    [ -n "$source" ] || continue
    if [ -d "$source" ]; then mkdir -p "$root$target"; else mkdir -p "$root${target%/*}"; [ -e "$root$target" ] || : > "$root$target"; fi
    mount --bind "$source" "$root$target"
    [ "$mode" = rw ] || mount -o remount,bind,ro "$root$target"
done <<< "$NODE_BINDS"

# The cluster's configuration.
here=$(dirname "$(readlink -f "$0")")
mkdir -p "$root/etc/slurm"
install -m 600 "$here/slurmdbd.conf" "$root/etc/slurm"
install -m 644 "$here/cgroup.conf" "$here/gres.conf" "$root/etc/slurm"
printf '%s' "$NODE_SLURM_CONF" > "$root/etc/slurm/slurm.conf"
install -m 755 "$here/daemons.sh" "$root/usr/local/sbin/daemons"

# Move in, and leave nothing of the host in sight.
cd "$root"
pivot_root . oldroot
cd /
umount -l /oldroot
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8
hostname cmrnode
echo "10.99.0.1 cmrnode" >> /etc/hosts
chmod 1777 /tmp
trap 'tail -n 20 /var/log/mariadbd.log /var/log/slurm/*.log >&2' ERR
[ "$NODE_NETWORK" = host ] || daemons start_network
if [ "$NODE_SLURM" = yes ]; then
    daemons start_munge
    [ "$NODE_ACCOUNTING" = no ] || daemons start_accounting
    daemons start_slurm
fi >&2
echo ready

# Wait for the host to let go. Bash reaps orphans meanwhile.
while read -r; do :; done
