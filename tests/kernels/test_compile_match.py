"""The match kernels compiled for every architecture, no GPU needed: no spills, the matrix units used, and room enough.

In a process of its own (this file run as a script), because here the kernels are Triton's interpreted ones.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHARED_MEMORY = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # KiB a block may have
CHANNELS = (20, 320, 1280)


def compiled_rows(arch, dtype):
    """Compile both kernels at every channel count; what each uses, as dictionaries."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from benchmarks import sass
    from todo_attn.kernels import launch, match

    half = dtype != "fp32"
    run = launch.match_settings(divmod(arch, 10), half)
    for channels in CHANNELS:
        kernels = (
            (match.match_kernel, match.match_constants(channels, half, run), run.options),
            (match.rows_kernel, match.rows_constants(channels, half, rescale=dtype != "fp16"), match.OPTIONS),
        )
        for kernel, constants, options in kernels:
            constants = dict(constants) | ({"stride_xc": 1, "stride_ik": 1} if kernel is match.rows_kernel else {})
            special = dict.fromkeys(("x", "packed", "query", "key"), f"*{dtype}")
            special |= dict.fromkeys(("index", "position"), "*i64")
            special |= dict.fromkeys(("reciprocal", "query_reciprocal", "key_reciprocal", "similarity"), "*fp32")
            names = kernel.arg_names
            signature = {n: "constexpr" if n in constants else special.get(n, "i32") for n in names}
            divisible = [n for n in names if signature[n].startswith("*") or n in ("rows", "query_rows", "key_rows")]
            source = ASTSource(
                kernel,
                signature=signature,
                constexprs={(names.index(n),): v for n, v in constants.items()},
                attrs={(names.index(n),): [["tt.divisibility", 16]] for n in divisible},
            )
            built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
            cubin = Path(sys.argv[3]) / "kernel.cubin"
            cubin.write_bytes(built.asm["cubin"])
            usage = sass.usage(cubin)
            yield {
                "kernel": kernel.__name__,
                "channels": channels,
                "registers": usage.registers,
                "stack": usage.stack,
                "spills": usage.spills,
                "shared": built.metadata.shared,
                "wgmma": built.asm["ptx"].count("wgmma.mma_async"),
                "tensor": any(op in built.asm["ptx"] for op in ("wgmma.mma_async", "mma.sync", "tcgen05.mma")),
            }


@pytest.mark.parametrize(
    ("arch", "dtype"), [*((arch, "fp16") for arch in SHARED_MEMORY), (90, "bf16"), (80, "fp32"), (120, "fp32")]
)
def test_match_kernels(arch, dtype, tmp_path):
    run = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, str(arch), dtype, str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    rows = json.loads(run.stdout)
    assert len(rows) == 2 * len(CHANNELS)
    for row in rows:
        assert row["shared"] <= SHARED_MEMORY[arch] * 1024, row
        assert row["spills"] == 0 and row["stack"] == 0, row
        if row["kernel"] == "match_kernel":
            assert row["tensor"] == (dtype != "fp32"), row
            assert (row["wgmma"] > 0) == (arch == 90 and dtype != "fp32"), row


if __name__ == "__main__":
    json.dump(list(compiled_rows(int(sys.argv[1]), sys.argv[2])), sys.stdout)
