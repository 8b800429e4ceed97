#!/usr/bin/env bash
# Everything that only a GPU can show: the kernels' resources and all tests (the compiled kernels, the
# recorded steps of decoding and of training among them), then attention, decoding, training and a
# dev set timed, beside peft and transformers (see requirements-optional.txt).
# Usage: bash scripts/gpu_check.sh [FOLDER [PART ...]]
# Figures go to the folder, docs/results/gpu by default, case by case as they are measured. Without
# parts, all of PARTS below in turn; each has LIMIT seconds (default 3600) and no more.
set -uo pipefail
cd "$(dirname "$0")/.."
PARTS="tests attention train-bf16 decode-bf16 train-fp32 decode-fp32 dev-bf16"
folder=${1:-docs/results/gpu}
shift
failed=0
# In the foreground, so that Ctrl-C reaches it; what does not end by itself is killed.
limited() { timeout --foreground -s INT -k 60 "${LIMIT:-3600}" "$@" || failed=1; }
if ! python3 -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "got no GPU that PyTorch can use; expected CUDA; \`python -m scripts.bench\` times a CPU" >&2
    exit 2
fi
mkdir -p "$folder"
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
python3 -c 'import torch, triton; print("torch", torch.__version__, "triton", triton.__version__)'
# Triton compiles each kernel for each shape of the tests: several processes, where that can be.
python3 -c 'import xdist' 2> /dev/null && many="-n 8"
for part in ${@:-$PARTS}; do
    echo "== $part"
    case $part in
        tests)
            limited python3 -m pytest -q -m 'slow or not slow' -p no:cacheprovider ${many:-} \
                > "$folder/tests.txt" 2>&1
            limited python3 tests/fast/compile_kernels.py >> "$folder/tests.txt" 2>&1
            tail -80 "$folder/tests.txt" ;;
        attention)
            limited python3 -m scripts.bench attention --out "$folder/attention.jsonl" ;;
        train-* | decode-* | dev-*)
            compile=; [[ $part == train-* ]] && compile=--compile
            limited python3 -m scripts.bench "${part%-*}" $compile --dtype "${part#*-}" \
                --out "$folder/$part.jsonl" ;;
        *)
            echo "got the part $part; expected some of: $PARTS" >&2; failed=1 ;;
    esac
done
exit $failed
