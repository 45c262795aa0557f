#!/bin/bash
# build-root.sh KIND DESTINATION MIRROR
# Makes a Debian root folder. KIND `node`: Slurm, its accounting, a database, Apptainer and the ordinary user `hpc`.
# KIND `base`: a bare system that stands in for the public base image, owned by that user.
# Started by node.py inside a mount namespace of its own. The file's content is the key under which its result is kept.
set -euo pipefail
kind=$1 destination=$2 mirror=$3

# Slurm is Debian stable's; Apptainer only stands in unstable, whose dated Release a frozen mirror serves past its end.
sources="deb $mirror trixie main"
packages=ca-certificates
if [ "$kind" = node ]; then
    sources+=$'\n'"deb $mirror sid main"
    packages+=,slurm-wlm,slurmdbd,munge,mariadb-server,python3,python3-venv,procps,iproute2
    packages+=,squashfs-tools,squashfuse,fuse2fs,fuse-overlayfs,e2fsprogs,uidmap,apptainer,skopeo,docker-registry
fi

# The dpkg options drop what a throwaway machine never shows.
printf '%s\n' "$sources" | mmdebstrap --mode=root --variant=apt --include="$packages" \
    --aptopt='APT::Default-Release "trixie"' --aptopt='Acquire::Check-Valid-Until "false"' \
    --keyring=/usr/share/keyrings/debian-archive-keyring.gpg \
    --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
    --dpkgopt='path-exclude=/usr/share/locale/*' \
    trixie "$destination" -

# Empty mount points, and no device nodes: the node brings its own, an ordinary user can own none.
find "$destination/dev" -xdev -mindepth 1 -delete
if [ "$kind" = node ]; then
    useradd --root "$destination" --create-home --uid 1000 --shell /bin/bash hpc
    grep -q '^hpc:' "$destination/etc/subuid" || echo 'hpc:100000:65536' | tee -a "$destination/etc/subgid" >> "$destination/etc/subuid"
    mkdir -p "$destination/oldroot" "$destination/shared"
else
    chown -R --no-dereference 1000:1000 "$destination"
fi
