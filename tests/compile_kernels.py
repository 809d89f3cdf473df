"""Compiles the GPU's kernels for one that need not be there; prints a JSON line each.

    python -m tests.compile_kernels CAPABILITY FOLDER      # 80 is an A100, 90 an H100

It runs as a process of its own, for in the tests' process Triton interprets.
"""

from __future__ import annotations

import json
import pathlib
import sys
from collections.abc import Mapping

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from services.llm.kernels import cuda_elementwise, cuda_paged_decode

HEADS = ((128, 4, "bf16"), (128, 4, "fp16"), (64, 7, "bf16"), (96, 1, "bf16"))
"""Head width, query heads a key head, dtype: Llama-3 and Mistral twice, Qwen2-0.5B, Phi-3."""
POINTERS = {
    "rows_nB": "*i64", "lengths_n": "*i64", "slots_S": "*i64", "part_nHCd": "*fp32", "weight_nHC": "*fp32",
}  # fmt: skip
IN_DTYPE = (
    "query_nHd", "key_pool", "value_pool", "out_nHd", "x_SHd", "cos_Sd", "sin_Sd", "gate_SD", "up_SD", "hidden_SD",
    "weight_D", "out_SD", "key_SGd", "value_SGd",
)  # fmt: skip
ALIGNED = ("query_str", "key_str", "value_str", "stride", "gate_str", "up_str", "width")


def compile_kernel(kernel, capability: int, dtype: str, constants: Mapping[str, int], **options: int):  # type: ignore[no-untyped-def]
    """Compiles a kernel with the types and alignments that Triton finds in a launch."""
    pointers = POINTERS | dict.fromkeys(IN_DTYPE, f"*{dtype}")
    types = pointers | {"scaling": "fp32", "eps": "fp32"} | dict.fromkeys(constants, "constexpr")
    signature = {name: types.get(name, "i32") for name in kernel.arg_names}
    aligned = [n for n in signature if n not in constants and (n in pointers or n.startswith(ALIGNED))]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={name: value for name, value in constants.items() if name in signature},
        attrs={(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def main() -> None:
    capability, folder = int(sys.argv[1]), pathlib.Path(sys.argv[2])
    for width, repeats, dtype in HEADS:
        decode = {
            "repeats": repeats,
            "padded_repeats": max(16, triton.next_power_of_2(repeats)),
            "width": width,
            "padded_width": triton.next_power_of_2(width),
            "page": 16,
            "chunk": cuda_paged_decode.CHUNK,
            "tile": cuda_paged_decode.TILE,
            "parts": cuda_paged_decode.PARTS,
        }
        store = {"row": 8 * width, "padded_row": triton.next_power_of_2(8 * width), "width": width}
        norm = {"width": 32 * width, "padded": triton.next_power_of_2(32 * width)}
        rotate = {
            "half": width // 2,
            "padded_half": triton.next_power_of_2(width // 2),
            "some_heads": cuda_elementwise.HEADS,
        }
        own = {"num_warps": cuda_paged_decode.WARPS, "num_stages": cuda_paged_decode.STAGES}
        for kernel, constants, options in (
            (cuda_paged_decode._attend_chunks, decode, own),
            (cuda_paged_decode._put_together, decode, own),
            (cuda_paged_decode._store, store, {"num_warps": cuda_paged_decode.WARPS}),
            (cuda_elementwise._rms_norm, norm, {"num_warps": 8}),
            (cuda_elementwise._rotate, rotate, {}),
            (cuda_elementwise._silu_mul, {"block": cuda_elementwise.BLOCK}, {}),
        ):
            made = compile_kernel(kernel, capability, dtype, constants, **options)
            cubin = folder / "-".join(map(str, (kernel.__name__, width, repeats, dtype, "cubin")))
            cubin.write_bytes(made.asm["cubin"])
            ptx = made.asm["ptx"]
            numbers = {
                "shared": made.metadata.shared,
                "copies": ptx.count("cp.async.cg"),
                "products": ptx.count("mma.sync"),
            }
            print(json.dumps({"name": kernel.__name__, "cubin": str(cubin), **numbers}))


if __name__ == "__main__":
    main()
