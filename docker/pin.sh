#!/bin/sh
# Make docker/*.txt again: every package that goes into an image, with its version and the hashes of its files, from
# pyproject.toml, constraints.txt and the metadata of the package index. Needs uv (pip install uv) and no container.
#   docker/pin.sh             what is pinned stays where it still fits
#   docker/pin.sh --upgrade   the newest versions
# requirements.txt  all but torch; the same in every image
# torch-cpu.txt     torch's build for CPUs, from torch's own index (TORCH_INDEX: another one)
# torch-cuda.txt    the build on PyPI with the CUDA libraries it needs (x86_64)
set -eu
cd "$(dirname "$0")/.."

TORCH_INDEX=${TORCH_INDEX-https://download.pytorch.org/whl/cpu}
torch=$(grep '^torch==' constraints.txt)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

pin() {
    uv --no-config pip compile --quiet --no-header --no-annotate --generate-hashes \
        --python-version 3.11 --python-platform linux --constraint constraints.txt "$@"
}

# Whatever torch for CUDA brings along is no part of an image for CPUs.
printf '%s\n' "$torch" >"$work/torch.in"
pin "$work/torch.in" --no-emit-package torch --output-file "$work/with.txt"
gpu=$(sed -n -E 's/^((nvidia|cuda)-[a-z0-9-]+|triton)==.*/\1/p' "$work/with.txt")

cp docker/requirements.txt docker/torch-cuda.txt "$work" 2>/dev/null || true
# shellcheck disable=SC2046,SC2086 # lists of names
pin pyproject.toml --extra digits --extra plots --extra tensorboard --extra metrics --extra rl \
    --no-emit-package torch $(printf -- '--no-emit-package %s ' $gpu) "$@" --output-file "$work/requirements.txt"
# shellcheck disable=SC2046 # a list of names
pin "$work/torch.in" $(sed -n -E 's/^([a-z0-9-]+)==.*/--no-emit-package \1/p' "$work/requirements.txt") \
    "$@" --output-file "$work/torch-cuda.txt"
pin "$work/torch.in" --no-deps --default-index "$TORCH_INDEX" --output-file "$work/torch-cpu.txt"

for name in requirements torch-cpu torch-cuda; do
    { echo "# Made by docker/pin.sh"; cat "$work/$name.txt"; } >"docker/$name.txt"
done
