"""Compile the kernels of fast/triton_attention.py for a Hopper GPU (sm_90), on any machine, and say
what they take.

    python tests/fast/compile_kernels.py bf16:64 fp32:128        type:head size, or nothing for all

Registers above 255 do not exist: what does not fit is spilled to slow memory, "stack". A processor
of an H100 or H200 has 65,536 registers and 227 KB of shared memory for all programs it runs at
once. test_triton_attention.py runs this in a process of its own, since tests themselves interpret.
"""
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)
sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import torch  # noqa: E402
import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from fast import triton_attention as fused  # noqa: E402

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
POINTERS = {"q", "k", "v", "pk", "pv", "out", "grad", "dq", "dk", "dv"}
FIXED = {"key_mask": "*u8", "lse": "*fp32", "scale": "fp32"}
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def build(kernel, name, sizes):
    """The kernel compiled as it is launched: fp32, bf16 or fp16, everything aligned by 16."""
    constants = {key: value for key, value in sizes.items() if key in kernel.arg_names}
    signature, aligned = {}, {}
    for i, arg in enumerate(kernel.arg_names):
        kind = f"*{name}" if arg in POINTERS else FIXED.get(arg, "i32")
        signature[arg] = "constexpr" if arg in constants else kind
        if kind.startswith("*") or re.fullmatch("[qkp]_.", arg):
            aligned[i,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, aligned)
    options = {key: sizes[key] for key in ("num_warps", "num_stages") if key in sizes}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def resources(built):
    """(registers a thread, bytes of stack), where Triton brought the program that reads them."""
    if not CUOBJDUMP.exists():
        return "?", "?"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(built.asm["cubin"])
        usage = subprocess.run([CUOBJDUMP, "--dump-resource-usage", file], capture_output=True,
                              text=True).stdout
    return re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()


def main(pairs):
    print(f"{'kernel':16}{'type':>6}{'D':>5}{'warps':>7}{'registers':>11}{'stack':>7}{'shared':>9}"
          f"{'wgmma':>7}{'mma':>5}")
    for pair in pairs or [f"{name}:{D}" for name in TYPES for D in (64, 128, 80)]:
        name, D = pair.split(":")
        q = torch.empty(32, 16, 96, int(D), dtype=TYPES[name], device="meta")      # (B, H, T, D)
        owners = fused.tiles(q, 10 + 96, causal=True)
        for kernel, sizes in ((fused.forward_kernel, owners), (fused.queries_kernel, owners),
                              (fused.keys_kernel, fused.tiles(q, 96, True, "keys"))):
            built = build(kernel, name, sizes)
            registers, stack = resources(built)
            ptx = built.asm["ptx"]
            print(f"{kernel.__name__:16}{name:>6}{D:>5}{built.metadata.num_warps:7}{registers:>11}"
                  f"{stack:>7}{built.metadata.shared:9}{ptx.count('wgmma.mma_async'):7}"
                  f"{ptx.count('mma.sync.al'):5}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
