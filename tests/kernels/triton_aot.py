"""Compiles every kernel for GPUs that are not here, and holds what comes out to bounds.

python tests/kernels/triton_aot.py [sm_80 …] [fp32 …]   (part of make test-kernels)

Prints a table in Markdown: registers, bytes that spill, and how many of the tensor's loads and
stores move 128 bits at once. Needs Triton, which brings the assemblers and disassemblers.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from syncbn.kernels.triton import backward, forward
from syncbn.kernels.triton.plan import Plan, make_plan

BIN = Path(triton.__file__).parent / "backends/nvidia/bin"
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp64": 8}
# (outer, channels, inner): a layer's two layouts, which divide by 16, and some that do not.
SHAPES = {
    "contiguous": (32, 256, 3136),
    "channels_last": (32 * 3136, 256, 1),
    "contiguous 7×7": (32, 2048, 49),
    "2-D, few channels": (4096, 3, 1),
}
# The most registers of a thread of 256: 64 let four programs run on a multiprocessor, 128 two.
REGISTERS = {"measure": 128, "normalise": 128, "gradient_sums": 128, "input_gradient": 128}
REGISTERS["merge_sets"] = 128
SPILLED = 8  # bytes: one number, of float64, where the assembler would rather have 64 registers


class Variant(NamedTuple):
    kernel: Any
    where: str  # of SHAPES, and options
    types: dict[str, str]
    constants: dict[str, Any]
    warps: int
    wide: bool  # the tensor's loads have to be of 128 bits


class Facts(NamedTuple):
    registers: int
    spilled: int
    loads: int
    wide_loads: int
    stores: int
    wide_stores: int


def variants(dtype: str) -> Iterator[Variant]:
    for where, shape in SHAPES.items():
        plan = make_plan(*shape, BYTES[dtype], 132)
        wide = plan.unit * BYTES[dtype] % 16 == 0
        for kernel, options in (
            (forward.measure, {}),
            (forward.normalise, {"BLOCK": 1, "ONCE": True, "CUMULATIVE": False, "count": None}),
            (forward.normalise, {"BLOCK": 16, "ONCE": False, "CUMULATIVE": True}),
            (backward.gradient_sums, {}),
            (backward.gradient_sums, dict.fromkeys(("dweight", "dbias"))),
            (backward.input_gradient, {}),
            (backward.input_gradient, dict.fromkeys(("count", "weight"))),
        ):
            few = ", ".join(f"{name} {value}".lower() for name, value in options.items())
            constants = shape_constants(plan, dtype) | options
            yield Variant(kernel, f"{where} {few}", types(dtype), constants, plan.warps, wide)
    constants = {"WIDTH": 16, "BLOCK": 32, "ONCE": False}
    yield Variant(forward.merge_sets, "", types(dtype), constants, 4, False)


def shape_constants(plan: Plan, dtype: str) -> dict[str, Any]:
    computed = tl.float64 if dtype == "fp64" else tl.float32
    tile = {"UNIT": plan.unit, "ROWS": plan.rows, "WIDTH": plan.width, "LAST": plan.last}
    return tile | {"DTYPE": computed}


def types(dtype: str) -> dict[str, str]:
    tensors = dict.fromkeys(("x", "y", "dy", "dx"), f"*{dtype}")
    layer = "*fp64" if dtype == "fp64" else "*fp32"
    names = ("weight", "bias", "running_mean", "running_var", "dweight", "dbias")
    return tensors | dict.fromkeys(names, layer) | {"tickets": "*i32", "batches": "*i64"}


def compiled(variant: Variant, target: GPUTarget) -> Any:
    """As launch.py's calls compile it: tensors are aligned, of other pointers nothing is known."""
    function, constants = variant.kernel, variant.constants
    signature, attributes = {}, {}
    for number, parameter in enumerate(function.params):
        name = parameter.name
        if name in constants:
            signature[name] = "constexpr"
            continue
        signature[name] = parameter.annotation_type or variant.types.get(name, "*fp64")
        if name in ("x", "y", "dy", "dx"):
            attributes[(number,)] = [["tt.divisibility", 16]]
    places = {name: number for number, name in enumerate(function.arg_names)}
    source = ASTSource(
        function,
        signature,
        constexprs={(places[name],): value for name, value in constants.items() if name in places},
        attrs=attributes,
    )
    return triton.compile(source, target=target, options={"num_warps": variant.warps})


def facts(kernel: Any, target: GPUTarget) -> Facts:
    return _of_amd(kernel) if target.backend == "hip" else _of_nvidia(kernel)


def _of_nvidia(kernel: Any) -> Facts:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        used = _run("cuobjdump", "-res-usage", file.name)
        code = _run("nvdisasm", "-c", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", used)
    assert found, used
    registers, stack, local = map(int, found.groups())
    counts = [
        len(re.findall(pattern, code))
        for pattern in (r"\bLDG\.", r"\bLDG\.\S*128\b", r"\bSTG\.", r"\bSTG\.\S*128\b")
    ]
    return Facts(registers, stack + local, *counts)


def _of_amd(kernel: Any) -> Facts:
    code = kernel.asm["amdgcn"]

    def metadata(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", code)
        assert found, name
        return int(found.group(1))

    counts = [
        len(re.findall(pattern, code))
        for pattern in (
            r"(?:global|buffer)_load_\w+",
            r"(?:global|buffer)_load_dwordx4\b",
            r"(?:global|buffer)_store_\w+",
            r"(?:global|buffer)_store_dwordx4\b",
        )
    ]
    spilled = 4 * metadata("vgpr_spill_count") + 4 * metadata("sgpr_spill_count")
    return Facts(metadata("vgpr_count"), spilled, *counts)


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run(
        [BIN / tool, *arguments], capture_output=True, text=True, check=True
    ).stdout


def check(variant: Variant, found: Facts) -> list[str]:
    """What is wrong with it, in words."""
    name, wrong = variant.kernel.__name__, []
    if found.spilled > SPILLED:
        wrong.append(f"{found.spilled} bytes spill")
    if found.registers > REGISTERS[name]:
        wrong.append(f"{found.registers} registers, more than {REGISTERS[name]}")
    if variant.wide and not found.wide_loads:
        wrong.append("no load is of 128 bits")
    if variant.wide and "sums" not in name and name != "measure" and not found.wide_stores:
        wrong.append("no store is of 128 bits")
    return wrong


def main(wanted: list[str]) -> int:
    targets = [name for name in TARGETS if name in wanted] or list(TARGETS)
    dtypes = [name for name in BYTES if name in wanted] or list(BYTES)
    pairs = [(target, dtype) for target in targets for dtype in dtypes]
    if not wanted:  # float16 is as wide as bfloat16: once is enough
        pairs = [pair for pair in pairs if pair[1] != "fp16" or pair[0] == "sm_90"]
    print("| GPU | dtype | kernel | registers | spilled | loads, wide | stores, wide |")
    print("|---|---|---|---|---|---|---|")
    failures = 0
    with ProcessPoolExecutor(2) as pool:
        for rows, wrong in pool.map(table, *zip(*pairs, strict=True)):
            print(*rows, sep="\n", flush=True)
            failures += len(wrong)
            for words in wrong:
                print(words, file=sys.stderr, flush=True)
    return min(failures, 1)


def table(target: str, dtype: str) -> tuple[list[str], list[str]]:
    """Rows of the table, and what is wrong."""
    rows, wrong = [], []
    for variant in variants(dtype):
        found = facts(compiled(variant, TARGETS[target]), TARGETS[target])
        what = f"{variant.kernel.__name__} {variant.where}".strip()
        numbers = (
            f"{found.registers} | {found.spilled} | {found.loads}, {found.wide_loads} | "
            f"{found.stores}, {found.wide_stores}"
        )
        rows.append(f"| {target} | {dtype} | {what} | {numbers} |")
        wrong += [f"{target} {dtype} {what}: {words}" for words in check(variant, found)]
    return rows, wrong


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
