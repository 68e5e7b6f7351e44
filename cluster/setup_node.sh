#!/usr/bin/env bash
# Sets up a fresh Ubuntu machine as a node of the cluster. `ray up` runs it on every node; running it again is harmless.
set -euo pipefail
cd "$(dirname "$0")/.."

if ! command -v make >/dev/null || ! python3 -c 'import ensurepip' 2>/dev/null; then
    sudo apt-get -qq update
    sudo DEBIAN_FRONTEND=noninteractive apt-get -qq install -y make python3-venv
fi
make --no-print-directory install

# Install NVIDIA's driver on machines with a GPU whose image does not have it.
if grep -qs 0x10de /sys/bus/pci/devices/*/vendor && ! [ -e /proc/driver/nvidia ]; then
    sudo apt-get -qq update
    sudo DEBIAN_FRONTEND=noninteractive apt-get -qq install -y ubuntu-drivers-common
    sudo ubuntu-drivers install --gpgpu
    sudo modprobe nvidia
fi

# Environment of the launcher's later commands, and thereby of Ray and all its jobs.
if ! grep -q RAY_AUTH_MODE ~/.bashrc; then
    cat >>~/.bashrc <<EOF
export PATH="$PWD/.venv/bin:\$PATH"
export RAY_AUTH_MODE=token
export RAY_USAGE_STATS_ENABLED=0
EOF
fi
chmod 600 ~/.ray/auth_token
