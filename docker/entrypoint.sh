#!/bin/sh
# What a container does with its arguments. Commands of distloop that need ranks get an agent that starts them:
#   docker run distloop train /configs/digits.yaml        one rank, or as many as PET_NPROC_PER_NODE says (2, gpu)
#   docker run distloop checkpoint list runs/digits       the other commands
#   docker run distloop torchrun --standalone my.py       a program, as it is; also python, sh, bash, /a/path
# PET_* are torchrun's own variables, one for each of its options: PET_NNODES, PET_NODE_RANK, PET_MASTER_ADDR, ...
# Everything ends in exec: signals come to the agent, and its exit code is the container's.
set -eu

AGENT=distloop.agent

case "${1-}" in
train | calibrate | doctor)
    # Without a word about other hosts: a port that nobody else has (containers may share the host's network), and
    # loopback (without a network a container's name leads nowhere).
    if [ -z "${PET_NNODES-}" ]; then
        export PET_STANDALONE=1 PET_LOCAL_ADDR="${PET_LOCAL_ADDR-127.0.0.1}"
    fi
    exec python -m "$AGENT" -m distloop "$@"
    ;;
python* | torchrun | distloop | sh | bash | */*)
    exec "$@"
    ;;
*)
    exec python -m distloop "$@"
    ;;
esac
