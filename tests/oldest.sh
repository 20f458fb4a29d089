#!/usr/bin/env bash
# The tests again, on the oldest transformers and Triton that are supported, in an environment of their own.
set -euo pipefail
cd "$(dirname "$0")/.."
: "${VENV:=.venv-oldest}" "${PYTHON:=python3}"
# That Triton's interpreter fails with a newer numpy.
OLDEST=("transformers==5.17.0" "triton==3.6.0" "numpy<2.4")
"$PYTHON" -m venv "$VENV"
# Pins of the newest transformers and of what it needs don't hold for the oldest.
grep -vE '^(transformers|huggingface_hub|tokenizers|numpy)==' constraints.txt > "$VENV/constraints.txt"
"$VENV/bin/python" -m pip install --quiet torch==2.13.0
"$VENV/bin/python" -m pip install --quiet --constraint "$VENV/constraints.txt" "${OLDEST[@]}" --editable '.[examples,test]'
OMP_NUM_THREADS=1 "$VENV/bin/python" -m pytest -n auto
