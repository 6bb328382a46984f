#!/bin/bash
# One process on this machine, without a launcher:  launch/local.sh CONFIG [settings...]
set -euo pipefail

exec "${PYTHON:-python}" -m distloop train "$@"
