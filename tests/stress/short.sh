#!/usr/bin/env bash
# Each promise of docs/trust.md for a short while; the power loss where an image can be mounted.
set -euo pipefail
cd "$(dirname "$0")"
for harness in kills:24 power_loss:4 full_disk:10 corruption:40 two_processes:2 numerics:1 \
    downloads:1 fuzz_files:300 fuzz_flags:300 size:20
do
    python "${harness%:*}.py" --count "${harness#*:}"
done
