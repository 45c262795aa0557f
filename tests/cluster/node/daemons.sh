#!/bin/bash
# daemons.sh VERB...: starts and stops the cluster's daemons inside the node. Called by init.sh and by node.py.
set -euo pipefail

# wait_for SECONDS WHAT COMMAND...: until COMMAND succeeds.
wait_for() {
    local end=$((SECONDS + $1)) what=$2
    shift 2
    until "$@" > /dev/null 2>&1; do
        [ $SECONDS -lt "$end" ] || { echo "$what did not come; its log lies in /var/log of the node" >&2; return 1; }
        sleep 0.1
    done
}

start_network() {
    # The daemons want an address that is not 127.0.0.1.
    ip link set lo up
    ip address add 10.99.0.1/32 dev lo
}

start_munge() {
    install -d -o munge -g munge /run/munge
    runuser -u munge -- munged
}

start_accounting() {
    install -d -o mysql -g mysql /run/mysqld
    setsid mariadbd --user=mysql --bind-address=127.0.0.1 --innodb-buffer-pool-size=64M \
        --innodb-flush-log-at-trx-commit=0 > /var/log/mariadbd.log 2>&1 < /dev/null &
    wait_for 180 "the database" mariadb-admin ping
    mariadb --execute "CREATE DATABASE slurm_acct_db;
        CREATE USER slurm@localhost IDENTIFIED BY 'slurm'; GRANT ALL ON slurm_acct_db.* TO slurm@localhost"
    slurmdbd
    wait_for 180 "accounting" sacctmgr --noheader show cluster
    sacctmgr --immediate add cluster cmrtest > /dev/null
}

start_slurm() {
    install -d /run/slurm /var/log/slurm /var/lib/slurm/slurmctld /var/lib/slurm/n1 /var/lib/slurm/n2
    slurmctld
    slurmd -N n1
    slurmd -N n2
    wait_for 180 "the compute nodes" idle
}

idle() {
    pgrep --exact slurmctld || exit 1  # it will not come any more
    [ "$(sinfo --noheader --format=%T | sort -u)" = idle ]
}

gone() { ! pgrep --exact "$1"; }

stop_controller() {
    pkill --exact slurmctld
    wait_for 120 "the end of slurmctld" gone slurmctld
}

start_controller() {
    slurmctld
    wait_for 120 "slurmctld" scontrol ping
}

restart_controller() {
    stop_controller
    start_controller
}

# Accounting is switched off for good, as an administrator would.
stop_accounting() {
    stop_controller
    pkill --exact slurmdbd
    sed --in-place /^AccountingStorage/d /etc/slurm/slurm.conf
    start_controller
}

# slurmctld forgets jobs soon after their end.
forget_jobs() {
    sed --in-place s/^MinJobAge=.*/MinJobAge=2/ /etc/slurm/slurm.conf
    scontrol reconfigure
}

fail_node() {
    local group=/sys/fs/cgroup/freezer/slurm_$1
    # Some end with their parent before their turn comes.
    { pgrep --full "^slurmd -N $1"; find "$group" -name cgroup.procs -exec cat {} +; } | xargs kill -KILL || true
    scontrol update NodeName="$1" State=DOWN Reason="lost on purpose"
}

recover_node() {
    slurmd -N "$1"
    scontrol update NodeName="$1" State=RESUME
    wait_for 120 "node $1" usable_node "$1"
}

# Idle, or already taken by a job that waited for it.
usable_node() { [[ $(sinfo --noheader --format=%T --nodes="$1" | sort -u) =~ ^(idle|mixed|allocated)-?$ ]]; }

"$@"
