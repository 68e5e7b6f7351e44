#!/usr/bin/env bash
# Runs a cxr command on the machines that Slurm allocates, as a Ray cluster that ends with the command:
#
#   sbatch --nodes 3 --gpus-per-node 4 cluster/slurm.sh \
#       cxr train classify --archive /data/nih --out /data/run --workers 12
#
# --archive and --out must be on a file system that all machines share, or in object storage. Activate the environment
# of cxr first, or set CXR_ENV to its folder: sbatch passes the environment on. Options of sbatch override the lines
# below. scancel sends SIGTERM to the job, and so does Slurm two minutes before the time limit: finished work is saved,
# and the same command continues. The exit code is that of the command.
#SBATCH --job-name=cxr
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@120
set -euo pipefail

if [ $# -eq 0 ]; then
    echo "error: expected a command, such as: sbatch cluster/slurm.sh cxr train align --archive ... --out ..." >&2
    exit 2
fi
if [ -n "${CXR_ENV:-}" ]; then
    PATH="$CXR_ENV/bin:$PATH"
fi
if ! command -v ray >/dev/null; then
    echo "error: the command ray was not found: activate the environment of cxr, or set CXR_ENV to its folder" >&2
    exit 2
fi

# Only processes of this job know the token, which every client of the cluster must present.
export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
RAY_AUTH_TOKEN=$(python3 -c 'import secrets; print(secrets.token_hex(32))')
export RAY_AUTH_TOKEN
# cxr cannot detect that the machines share folders.
export CXR_SHARED_FILESYSTEM="${CXR_SHARED_FILESYSTEM:-1}"
# Ray's default, /tmp/ray, may belong to another user of the machine.
export RAY_TMPDIR="/tmp/cxr-$SLURM_JOB_ID"

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${nodes[0]}
# Several jobs may share a machine, so the ports are derived from the id of the job.
port=$((20000 + SLURM_JOB_ID % 20000))
address=$(srun --nodes=1 --ntasks=1 --overlap --nodelist="$head" hostname --ip-address | awk '{print $1}'):$port
resources=(--num-cpus="${SLURM_CPUS_PER_TASK:-$(nproc)}")
gpus=${SLURM_GPUS_ON_NODE:-0}
if [[ $gpus =~ ^[0-9]+$ ]]; then
    resources+=(--num-gpus="$gpus")
fi

ulimit -n 65536 2>/dev/null || true
start() { # on one machine: NODE OPTIONS...
    srun --nodes=1 --ntasks=1 --overlap --nodelist="$1" ray start --block "${resources[@]}" "${@:2}" \
        >"ray-$SLURM_JOB_ID-$1.log" 2>&1 &
    steps+=($!)
}
steps=()
trap 'kill "${steps[@]}" 2>/dev/null; wait' EXIT
trap 'exit 143' TERM INT
start "$head" --head --port="$port" --node-ip-address="${address%:*}" \
    --dashboard-host=127.0.0.1 --dashboard-port=$((port + 20000))
sleep 5
for node in "${nodes[@]:1}"; do
    start "$node" --address="$address"
done

count="import ray; ray.init('$address', logging_level='ERROR', log_to_driver=False)
print(sum(node['Alive'] for node in ray.nodes()))"
for attempt in {1..40}; do
    alive=$(timeout 60 python3 -c "$count" 2>/dev/null || echo 0) # without a head, Ray would wait forever
    if [ "$alive" -ge "${#nodes[@]}" ]; then
        break
    elif [ "$attempt" = 40 ] || ! kill -0 "${steps[0]}" 2>/dev/null; then
        echo "error: $alive of ${#nodes[@]} machines run Ray; it did not start on the others in time: see ray-$SLURM_JOB_ID-*.log" >&2
        exit 1
    fi
    sleep 5
done

# The job joins the cluster at RAY_ADDRESS. It gets SIGTERM from here, and its exit code is that of this script.
RAY_ADDRESS=$address "$@" &
job=$!
trap 'kill -TERM "$job" 2>/dev/null' TERM INT
code=0
wait "$job" || code=$?
while kill -0 "$job" 2>/dev/null; do # the signal ended the wait, but not the job
    code=0
    wait "$job" || code=$?
done
exit "$code"
