"""Read the kernels' machine code for sm_90 (bfloat16, channels_last), and check that a GPU could run it near its limits.

    python scripts/machine_code.py            check the code of today's kernels; figures may only fall
    python scripts/machine_code.py --write    put today's figures into docs/results/kernels.json

No GPU is needed. Times come from a model: bytes at 4.3 TB/s, two instructions a cycle on each of 132 multiprocessors. The file
lists each kernel with its figures and the requirements that it fails; these may only become fewer. Another version of Triton
writes other code: then the figures are not compared, but no kernel may fail a requirement that the file does not list for it.
"""

import argparse
import json
import math
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from compile_check import BATCH, Launch, Layer, catching, compiled_for, dump, launch_all, resources

from fastloda.kernels.conv import Conv

FILE = Path(__file__).resolve().parent.parent / "docs" / "results" / "kernels.json"
ARCH, PROCESSORS, CLOCK, BANDWIDTH = 90, 132, 1.755e9, 4.3e12
REGISTERS, SHARED, THREADS = 65_536, 233_472, 2048  # of a multiprocessor
SAME, POINT = Conv((3, 3), padding=(1, 1)), Conv((1, 1))
LAYERS = [
    Layer(128, 128, (32, 32), SAME),
    Layer(512, 512, (8, 8), SAME),
    Layer(64, 64, (32, 32), SAME),
    Layer(128, 128, (4, 4), SAME),
    Layer(64, 64, (32, 32), POINT),
    Layer(128, 128, (8, 8), POINT),
]
IN_PLACE = {"_add_kernel", "_input_grad_kernel"}  # their first tensor is read and written
# The most that each figure may be. A launch takes 2 us: where memory takes less, how it is read does not matter.
LIMITS = {"shuffles": 40, "no_hgmma": 0, "blocks_below_2": 0, "stack": 0}
TIMED = {"narrow": 0, "kib_in_flight_missing": 0, "issue_over_floor": 0.8}
LEAST_TIMED_US = 2


class Instruction(NamedTuple):
    """An instruction of the machine code: its address, operation with modifiers, and whole text."""

    address: int
    operation: str
    text: str


def instructions(cubin: bytes) -> list[Instruction]:
    """Disassemble machine code, without padding."""
    found = re.findall(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?\w+ +)?((\S+).*?);", dump(cubin, "-sass"), re.MULTILINE)
    return [Instruction(int(address, 16), name, text) for address, text, name in found if name != "NOP"]


def loops(code: list[Instruction]) -> list[tuple[int, int]]:
    """Find the loops, as addresses of their first and last instructions, outer loops before inner ones."""
    jumps = [(re.search(r"0x([0-9a-f]+)", i.text), i.address) for i in code if i.operation.startswith("BRA")]
    ends = [(int(to[1], 16), at) for to, at in jumps if to]
    return sorted((to, at) for to, at in ends if to < at)


def executed(code: list[Instruction], turns: list[float]) -> int:
    """Count the instructions that a warp executes; turns: the number of iterations of each loop."""
    found = loops(code)
    turns = turns if len(found) == len(turns) else [n for n in turns if n > 1]  # a loop of one turn is compiled away
    weights = [math.prod(n for (first, last), n in zip(found, turns) if first <= i.address <= last) for i in code]
    return round(sum(weights))


def narrow(code: list[Instruction]) -> int:
    """Count the accesses to global memory of less than 64 bits, except one: a loop's scalar or a norm's part."""
    accesses = [i.operation for i in code if i.operation.startswith(("LDG.", "LDGSTS.", "STG."))]
    return max(0, sum(not re.search(r"\.(64|128)", operation) for operation in accesses) - 1)


def turns(launch: Launch) -> list[float]:
    """Compute the number of iterations of each of the kernel's loops."""
    a = dict(zip(launch.kernel.arg_names, launch.arguments)) | dict(launch.options)
    across = lambda size, tile: -(-a[size] // a[tile])  # noqa: E731
    match launch.kernel.__name__:
        case "_project_kernel":
            return [a["STRIPS"] / launch.programs, across("C", "BC")]
        case "_pointwise_kernel":
            return [across("C", "BC")]
        case "_pointwise_backward_kernel":
            return [across("SPAN", "BP")]
        case "_backward_kernel":
            return [across("OUT", "BC")]
        case "_norm_kernel":
            return [a["views"] * -(-a["H"] * a["W"] // a["BP"])]
    return []


def figures(launch: Launch) -> dict[str, object]:
    """Compile a launch, and compute the figures of its machine code."""
    compiled = compiled_for(ARCH, launch)
    code, options = instructions(compiled.asm["cubin"]), dict(launch.options)
    registers, stack = resources(compiled.asm["cubin"])
    warps, shared = compiled.metadata.num_warps, compiled.metadata.shared
    of_a_warp = -(-registers * 32 // 256) * 256
    blocks = min(REGISTERS // of_a_warp // warps, SHARED // (shared + 1024), THREADS // 32 // warps)
    in_loops = turns(launch)
    per_warp = executed(code, in_loops)
    moved = sum(launch.bytes) + (launch.bytes[0] if launch.kernel.__name__ in IN_PLACE else 0)
    floor, issue = moved / BANDWIDTH, per_warp * warps * launch.programs / (PROCESSORS * 2 * CLOCK)
    in_flight = _tile_bytes(options, in_loops[-1:]) * min(blocks, -(-launch.programs // PROCESSORS))
    products = sum(i.operation.startswith("HGMMA") for i in code)
    row = {
        "programs": launch.programs, "warps": warps, "registers": registers, "shared": shared, "blocks": blocks,
        "instructions": per_warp, "floor_us": _short(floor * 1e6), "issue_us": _short(issue * 1e6),
        "narrow": narrow(code), "shuffles": sum(i.operation.startswith("SHFL") for i in code),
        "no_hgmma": int(products == 0 and _wide(options)), "blocks_below_2": max(0, 2 - blocks),
        "kib_in_flight_missing": max(0, 32 - in_flight // 1024), "issue_over_floor": _short(issue / floor), "stack": stack,
    }  # fmt: skip
    return row | {"fails": failing(row)}


def _tile_bytes(options: dict, turns: list[float]) -> int:
    """Compute the bytes of activations that a program has in flight: a whole tile, or the tiles that its loop has prefetched."""
    ahead = max(1, min(options.get("STAGES", 2) - 1, *turns, 8))
    channels = options["BC"] + (options["BO"] if "SPAN" in options else 0)  # of x, and of gy where both are read
    return int(options.get("BI", options.get("BP", 0)) * channels * 2 * ahead)


def _wide(options: dict) -> bool:
    """Tell whether a product fills the 64 rows of a tensor core's instruction."""
    return options["BM" if "STORE" in options else "BI" if "BI" in options else "BP"] >= 64


def _short(number: float) -> float:
    return float(f"{number:.3g}")


def rows() -> Iterator[tuple[str, dict[str, object]]]:
    """Yield (layer and kernel, figures) for the kernels with products, which read or write activations."""
    for layer in LAYERS:
        with catching() as caught:
            launch_all(layer, torch.bfloat16, torch.channels_last)
        seen: set[str] = set()
        for launch in caught:
            name = launch.kernel.__name__.strip("_").removesuffix("_kernel")
            name += ", stored" if dict(launch.options).get("STORE") else ""
            if "BC" in dict(launch.options) and "weighted" not in name and name not in seen:  # the adapter's come first
                seen.add(name)
                yield f"{layer.name}: {name}", figures(launch)


def failing(row: dict) -> list[str]:
    """List the requirements that a kernel fails."""
    limits = LIMITS | (TIMED if row["floor_us"] >= LEAST_TIMED_US else {})
    return [figure for figure, most in limits.items() if row[figure] > most]


def complaints(found: dict, known: dict, same_triton: bool) -> list[str]:
    """List the failed requirements that `known` lacks and, with the same Triton, the figures that have risen."""
    said = []
    for name, row in found.items():
        before = known.get(name, {"fails": []})
        said += [f"{name}: {figure} {row[figure]}" for figure in row["fails"] if figure not in before["fails"]]
        if same_triton and "issue_us" in before:
            kept = ["issue_us", *before["fails"]]
            said += [f"{name}: {f} {row[f]}, {before[f]} before" for f in kept if row[f] > before[f]]
    return said


def main(show: Callable[[str], None] = print) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write today's figures")
    arguments = parser.parse_args()
    try:
        show(f"disassembler: {Path(triton.knobs.nvidia.nvdisasm.path).name}")
    except RuntimeError as error:  # Triton's wheel for another platform has none
        show(f"machine code is not checked: {error}")
        return 0
    document = json.loads(FILE.read_text()) if FILE.exists() else {"rows": {}}
    found = dict(rows())
    if arguments.write:
        document = {"triton": triton.__version__, "arch": ARCH, "dtype": "bfloat16", "images": BATCH, "rows": found}
        FILE.write_text(_lines(document))
    said = complaints(found, document["rows"], document["triton"] == triton.__version__)
    for line in said:
        show(line)
    known = sum(len(row["fails"]) for row in found.values())
    show(f"machine code of {len(found)} kernels: {len(said)} worse than before, {known} requirements known to fail")
    return 1 if said else 0


def _lines(document: dict) -> str:
    """Format the document as JSON with one line for each row."""
    rows = ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in document["rows"].items())
    head = json.dumps({key: value for key, value in document.items() if key != "rows"})
    return f'{head[:-1]}, "rows": {{\n{rows}\n}}}}\n'


if __name__ == "__main__":
    sys.exit(main())
