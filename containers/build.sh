#!/bin/bash
# Build the image, as an ordinary user.
#
#   containers/build.sh                       cmrhpc.sif and its cmrhpc.sif.sha256, in the current folder
#   containers/build.sh --torch 2.6           for GPUs from Maxwell to Volta
#   containers/build.sh --output FILE.sif
#   containers/build.sh --base IMAGE          another Debian 13, e.g. from a registry of the site
#   containers/build.sh --pin                 look up the digest of the base image, write it to containers/base.pin, and
#                                             stop; later builds start from exactly that image
#   containers/build.sh -- OPTIONS            the rest goes to `apptainer build`, which runs in the root of the clone: name
#                                             files in full, but for base=FOLDER_OR_SIF
#
# pip inside uses the index, proxy and certificate that pip outside is configured for. The build unpacks in
# APPTAINER_TMPDIR (else TMPDIR, else /tmp), which needs 12 GB free.
set -euo pipefail
here=$(dirname "$(readlink -f "$0")")
fail() { printf '%s\n' "$@" >&2; exit 2; }
has_value() { [ -n "${2:-}" ] || fail "$1 needs a value; see $0 --help"; }

output=$PWD/cmrhpc.sif
torch=''
base=''
pin=no
while [ $# -gt 0 ]; do
    case $1 in
        --torch) has_value "$@"; torch=$2; shift 2 ;;
        --output) has_value "$@"; output=$2; shift 2 ;;
        --base) has_value "$@"; base=$2; shift 2 ;;
        --pin) pin=yes; shift ;;
        --) shift; break ;;
        -h | --help) sed -n '2,/^set/{/^set/!s/^# \{0,1\}//p}' "$0"; exit 0 ;;
        *) fail "unknown option $1; see $0 --help" ;;
    esac
done

# Look the digest up with whichever registry client is there.
if [ $pin = yes ]; then
    image=${base:-$(sed -n 's/^ *base=//p' "$here/cmrhpc.def")}
    if command -v skopeo > /dev/null; then
        look_up=(skopeo inspect --format '{{.Digest}}' "docker://$image")
    elif command -v crane > /dev/null; then
        look_up=(crane digest "$image")
    else
        fail "--pin needs skopeo or crane to ask the registry"
    fi
    digest=$("${look_up[@]}") || fail "$image was not found in any registry in reach; nothing is pinned"
    echo "$(sed -E 's#@.*##; s#:[^/:]*$##' <<< "$image")@$digest" | tee "$here/base.pin"
    exit 0
fi

# What would fail only after minutes.
folder=$(dirname "$output")
[ -d "$folder" ] && [ -w "$folder" ] || fail "the image cannot be written" "  where: $folder" \
    "  mend:  name a file in a folder that exists and is yours"
[ ! -d "$output" ] || fail "--output is a folder" "  where: $output" "  mend:  name the file, $output/cmrhpc.sif"
output=$(readlink -f "$output")
command -v apptainer > /dev/null || fail "apptainer is not here" \
    "  mend:  \`module load apptainer\`, or build on another Linux machine and copy the .sif and .sha256"

# What differs from the definition's own arguments.
arguments=(--build-arg "commit=$(git -C "$here" describe --always --dirty 2> /dev/null || echo unknown)")
[ -n "$base" ] || [ ! -e "$here/base.pin" ] || base=$(cat "$here/base.pin")
[ -z "$base" ] || arguments+=(--build-arg "base=$base")
if [ -n "$torch" ]; then
    [ -f "$here/requirements-torch$torch.txt" ] || fail "there is no lock for torch $torch" \
        "  mend:  python3 containers/lock.py --torch $torch, with the Python of the image"
    arguments+=(--build-arg "torch=$torch")
fi

# Room to unpack in.
unpack=${APPTAINER_TMPDIR:-${TMPDIR:-/tmp}}
mend="  mend:  set APPTAINER_TMPDIR to a folder with 12 GB free, on a local disk"
[ -d "$unpack" ] && [ -w "$unpack" ] || fail "no folder to build in" "  where: $unpack" "$mend"
free=$(df --output=avail --block-size=1G "$unpack" | tail -n 1)
[ "$free" -ge 12 ] || fail "too little room to build in: $free GB free" "  where: $unpack" "$mend"

# Turn how pip reaches its index into variables, which the definition passes on: files of this machine are not seen inside.
# Its other settings (user, target, require-virtualenv) are for environments of this machine.
if python3 -m pip --version > /dev/null 2>&1; then
    while IFS='=' read -r key value; do
        case ${key##*.} in
            index-url | extra-index-url | find-links | no-index | trusted-host | proxy | cert | timeout | default-timeout | retries) ;;
            *) continue ;;
        esac
        name=PIP_$(tr 'a-z-' 'A-Z_' <<< "${key##*.}")
        value=${value#\'} value=${value%\'}
        [ -n "${!name:-}" ] || export "$name=${value//\\n/ }"
    done < <(python3 -m pip config list)
fi

# A base on disk is named from where the caller stands.
for word in "$@"; do
    case $word in base=*) [ ! -e "${word#base=}" ] || word=base=$(readlink -f "${word#base=}") ;; esac
    arguments+=("$word")
done

cd "$here/.."
apptainer build --force "${arguments[@]}" "$output.part" containers/cmrhpc.def || fail "the image was not built" \
    "  mend:  Apptainer's words above tell why; where users may not build (no user namespaces), build on another Linux" \
    "         machine and copy the .sif and .sha256"
# No image lies beside the checksum of another at any time: one without any is refused.
digest=$(sha256sum "$output.part")
echo "${digest%% *}  $(basename "$output")" > "$output.sha256.part"
rm -f "$output.sha256"
mv "$output.part" "$output"
mv "$output.sha256.part" "$output.sha256"
cat "$output.sha256"
