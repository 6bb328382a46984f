#!/bin/bash
# Ranks by mpirun, of Open MPI or MPICH (Intel MPI is of the latter's family):  launch/mpirun.sh CONFIG [settings...]
#
#   RANKS=4                                          on this host; default: 2
#   RANKS=8 HOSTS=host-a:4,host-b:4                  on these, so many each
#   GRACE=10                                         seconds that Open MPI leaves ranks when one has ended; default: 5
#   MPIRUN=/opt/mpi/bin/mpirun                       of which MPI
set -euo pipefail

mpirun=${MPIRUN:-mpirun} ranks=${RANKS:-2}
if ! said=$("$mpirun" --version 2>&1); then
    echo "launch/mpirun.sh: $mpirun cannot be run: install an MPI, or set MPIRUN to its mpirun" >&2
    exit 3
fi

# As distloop/report/mpi.py has it, in that order.
case $said in
    *"Intel(R) MPI"* | *MVAPICH* | *HYDRA* | *MPICH*)
        options=() # it passes signals on, and waits
        hosts=(-hosts "${HOSTS:-}")
        ;;
    *"Open MPI"* | *OpenRTE* | *PRRTE*)
        # It kills the others one second after the first has ended otherwise; version 5 does so whatever is said.
        options=(--mca odls_base_sigkill_timeout "${GRACE:-5}" --map-by :OVERSUBSCRIBE)
        hosts=(--host "${HOSTS:-}")
        ;;
    *)
        echo "launch/mpirun.sh: $mpirun is neither Open MPI's nor MPICH's: ${said%%$'\n'*}" >&2
        exit 3
        ;;
esac
if [ -n "${HOSTS:-}" ]; then options+=("${hosts[@]}"); fi

# SIGTERM would have Open MPI kill ranks before they have saved. SIGUSR1 asks for the same, and is passed on at once.
set -m # a group of its own, so that Ctrl-C comes here alone
asked=
stop() { # the second one, later than a scheduler that signals in two ways, ends the job
    if [ -z "$asked" ]; then
        asked=$SECONDS
        kill -USR1 "$job"
    elif [ $((SECONDS - asked)) -gt 1 ]; then
        kill -TERM "$job"
    fi
}
trap stop TERM INT HUP
trap 'kill -USR1 "$job"' USR1 USR2
set +e
"$mpirun" -n "$ranks" ${options[@]+"${options[@]}"} "${PYTHON:-python}" -m distloop train "$@" < /dev/null &
job=$!
while kill -0 "$job" 2> /dev/null; do wait "$job"; done
wait "$job"
