#!/usr/bin/env bash
# Everything that only a GPU can tell, in one go: the kernels' resources, all tests (the compiled
# kernels and the recorded steps of decoding among them), attention, decoding and training timed.
# Figures go to the folder given, figures/results by default; the tables come last.
# Usage: bash figures/gpu_check.sh [FOLDER]
set -uo pipefail
cd "$(dirname "$0")/.."
folder=${1:-figures/results}
mkdir -p "$folder"
failed=0
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader || failed=1
python3 -c 'import torch, triton; print("torch", torch.__version__, "triton", triton.__version__)'
python3 tests/compile_kernels.py > "$folder/kernels-sm90.txt" 2>&1 || failed=1
python3 -m pytest -q -p no:cacheprovider > "$folder/tests.txt" 2>&1 || failed=1
tail -40 "$folder/tests.txt"
cat "$folder/kernels-sm90.txt"
python3 bench.py attention --out "$folder/attention.jsonl" || failed=1
for dtype in bf16 fp32; do        # beside peft and transformers, see requirements-optional.txt
    python3 bench.py decode --dtype "$dtype" --out "$folder/decode-$dtype.jsonl" || failed=1
    python3 bench.py train --compile --dtype "$dtype" --out "$folder/train-$dtype.jsonl" || failed=1
    python3 bench.py dev --dtype "$dtype" --out "$folder/dev-$dtype.jsonl" || failed=1
done
exit $failed
