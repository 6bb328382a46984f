#!/bin/bash
# Ranks by torchrun (distloop's own, which ends with their exit code):  launch/torchrun.sh CONFIG [settings...]
#
#   RANKS=4                                          on this host; default: one per GPU, or 1
#   RANKS=4 HOSTS=2 HOST=0 MASTER=host-a:29500       on 2 hosts, of which this is number 0: started on each, HOST=0, 1
#   RANKS=4 HOSTS=1:4 MASTER=host-a:29500            on 1 to 4 hosts that may come and go; the same line on each
#   RESTARTS=3                                       start again so many times when a rank dies
#   ADDRESS=10.0.0.1                                 under which the others find this host, if not by its name
set -euo pipefail

hosts=${HOSTS:-1} host=${HOST:-0} master=${MASTER:-} ranks=${RANKS:-gpu}
if [ "$ranks" = gpu ] && ! nvidia-smi -L > /dev/null 2>&1; then ranks=1; fi

where=(--nnodes "$hosts" --nproc-per-node "$ranks" --max-restarts "${RESTARTS:-0}")
if [ "$hosts" = 1 ]; then
    where+=(--standalone)
elif [ -z "$master" ]; then
    echo "launch/torchrun.sh: MASTER=ADDRESS:PORT is missing: where do the $hosts hosts meet?" >&2
    exit 2
elif [[ "$hosts" == *:* ]]; then
    where+=(--rdzv-backend c10d --rdzv-endpoint "$master" --rdzv-id "${JOB:-distloop}")
    # Else an agent that comes back after hosts were fewer ends all of them a minute later.
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
else
    where+=(--node-rank "$host" --master-addr "${master%:*}" --master-port "${master##*:}" --rdzv-id "${JOB:-distloop}")
fi
if [ -n "${ADDRESS:-}" ]; then where+=(--local-addr "$ADDRESS"); fi

exec "${PYTHON:-python}" -m distloop.agent "${where[@]}" -m distloop train "$@"
