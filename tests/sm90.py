"""sm90.py -- do the Triton kernels suit a Hopper GPU that is not here?

    python tests/sm90.py                         # compiles for sm_90 and prints a table
    python tests/sm90.py --json 192 384 fp16     # the same of D, H and a dtype, for a program

Triton's compiler needs no GPU, and the cuobjdump in its wheel says what became of each kernel.
"""
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import kernels  # noqa: E402

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
S, E, K = 65536 * 2, 8, 2


def compiled(kernel, pointers, constants, warps, stages):
    """Compile for sm_90 and look inside; an argument that is neither one is a stride."""
    signature, known, aligned = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], known[i,] = "constexpr", constants[name]
        else:
            signature[name], aligned[i,] = pointers.get(name, "i32"), [["tt.divisibility", 16]]
    binary = triton.compile(ASTSource(kernel, signature, known, aligned),
                            target=GPUTarget("cuda", 90, 32),
                            options={"num_warps": warps, "num_stages": stages})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage, sass = (subprocess.check_output([CUOBJDUMP, word, file.name], encoding="utf-8",
                                               stderr=subprocess.STDOUT)
                       for word in ("-res-usage", "-sass"))
    return {"registers": int(re.search(r"REG:(\d+)", usage)[1]),
            "spills": int(re.search(r"STACK:(\d+)", usage)[1]),
            "shared": binary.metadata.shared, "wgmma": sass.count("HGMMA")}


def product(epilogue, D, H, dtype):
    block, numbers = kernels.choose_blocks(S, E, DTYPES[dtype])[epilogue], "*" + dtype
    index = dict.fromkeys(("ORDER", "OFFSETS", "EXPERT", "START"), "*i64")
    used = {"up": ("BIAS", "Z"), "down": ("BIAS", "GATES"), "dx": (),
            "da": ("GATES", "Z", "GATED_A", "DGATES", "DB")}[epilogue]
    optional = dict.fromkeys(("BIAS", "Z", "GATED_A"), numbers)
    optional |= dict.fromkeys(("GATES", "DGATES", "DB"), "*fp32")
    pointers = dict.fromkeys(("A", "W", "OUT"), numbers) | index
    pointers |= {name: optional[name] for name in used}
    depth, width = (D, H) if epilogue in ("up", "da") else (H, D)
    constants = {"E": E, "DEPTH": depth, "WIDTH": width, "EPILOGUE": epilogue, "PRECISION": "ieee",
                 "SHARED_BY": K if epilogue == "up" else 0, "ROWS": block.rows,
                 "COLUMNS": block.columns, "STEP": block.step,
                 "stride_wc" if epilogue in ("up", "down") else "stride_wd": 1}
    constants |= {name: None for name in optional if name not in used}
    return compiled(kernels.grouped_gemm, pointers, constants, block.warps, block.stages)


def gradient(which, D, H, dtype):
    block, numbers = kernels.choose_blocks(S, E, DTYPES[dtype])["dw"], "*" + dtype
    pointers = dict.fromkeys(("A", "B", "DW"), numbers) | {"OFFSETS": "*i64"}
    height, width = (D, H) if which == "dw_in" else (H, D)
    constants = {"HEIGHT": height, "WIDTH": width, "PRECISION": "ieee",
                 "ROWS": block.rows, "COLUMNS": block.columns, "STEP": block.step}
    return compiled(kernels.grouped_dw, pointers, constants, block.warps, block.stages)


def main(words):
    as_json = "--json" in words
    sizes = [word for word in words if word != "--json"] or ["384", "1536", "bf16"]
    D, H, dtype = int(sizes[0]), int(sizes[1]), sizes[2]
    rows = {name: product(name, D, H, dtype) for name in ("up", "down", "da", "dx")}
    rows |= {name: gradient(name, D, H, dtype) for name in ("dw_in", "dw_out")}
    if as_json:
        return print(json.dumps(rows))
    print(f"sm_90, D={D}, H={H}, {dtype}, Triton {triton.__version__}")
    for name, row in rows.items():
        print(f"{name:8}", *(f"{value:7} {key}" for key, value in row.items()))


if __name__ == "__main__":
    main(sys.argv[1:])
