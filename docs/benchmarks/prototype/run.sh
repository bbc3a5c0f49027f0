#!/bin/sh
# Times the plan's routing step, re-created, and ours, one after the other, and prints how many times faster we are.
#   NASHSWARM: the program (default: nashswarm)    PYTHON: one with NumPy, and PyTorch for its dense layer (default: python3)
#   THREADS: of our layer and PyTorch's (default: all cores)
# Measure on a quiet machine.
set -eu
here=$(dirname "$0")
results=$(mktemp)
trap 'rm -f "$results"' EXIT
"${NASHSWARM:-nashswarm}" bench routing --shape plan -r 20 ${THREADS:+-t "$THREADS"} --json "$results"
"${PYTHON:-python3}" "$here/routing_prototype.py" ${THREADS:+--threads "$THREADS"} --compare "$results"
