"""Run the CUDA text under ThreadSanitizer and AddressSanitizer, threads as threads of the system.

    make sanitize        (python -m tests.ops.sanitize, five minutes of one processor)

The launches of small cases are written to files with their arguments, and replayed by a program
without Python, in which every argument is memory of its own. What sanitizers report is an error.
The same text without barriers, or with one row too many, must be reported.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from mlip.nn.sphere_product import SphereBasis
from mlip.ops import RotationSignature
from mlip.ops.cuda.double_backward import cuda_double_backward
from mlip.ops.cuda.program import Grid, Program
from mlip.ops.cuda.segments import cuda_segment_shares, cuda_segment_sum
from tests.ops import test_ops_cuda_convolution as convolutions
from tests.ops import test_ops_cuda_edge_gradient as forces
from tests.ops import test_ops_cuda_gated_product as gated
from tests.ops import test_ops_cuda_rotation as rotations
from tests.ops import test_ops_cuda_segments as segments
from tests.ops import test_ops_cuda_shared_operator as operators
from tests.ops import test_ops_cuda_sphere_products as products
from tests.ops import test_ops_cuda_tables as tables
from tests.ops import test_ops_double_backward as seconds
from tests.ops.host_cuda import HERE, KERNEL, HostModule, entries

SINGLE = torch.float32
Change = Callable[[str], str]
MAIN = r"""
using Launch = int (*)(const unsigned*, size_t, int, void**);
const std::pair<const char*, Launch> kernels[] = {KERNELS};

template <typename T>
T next(FILE* file) {
  T value;
  if (fread(&value, sizeof(T), 1, file) != 1) exit(3);
  return value;
}

int main(int, char** arguments) {
  FILE* file = fopen(arguments[1], "rb");
  const int at_once = atoi(arguments[2]), n_launches = next<int>(file);
  for (int i = 0; i < n_launches; ++i) {
    char name[64];
    unsigned sizes[6];
    if (fread(name, 1, 64, file) != 64 || fread(sizes, 4, 6, file) != 6) return 3;
    const int shared = next<int>(file), n = next<int>(file);
    std::vector<long long> values(n);
    std::vector<std::unique_ptr<char[]>> memory;
    for (long long& value : values) {
      const int is_tensor = next<int>(file);
      value = next<long long>(file);
      if (!is_tensor || value == 0) continue;
      memory.emplace_back(new char[value]);
      if (fread(memory.back().get(), 1, value, file) != size_t(value)) return 3;
      value = reinterpret_cast<long long>(memory.back().get());
    }
    std::vector<void*> addresses;
    for (long long& value : values) addresses.push_back(&value);
    bool found = false;
    for (const auto& [known, launch] : kernels) {
      if (strcmp(known, name)) continue;
      launch(sizes, shared, at_once, addresses.data());
      found = true;
    }
    if (!found) return 3;
  }
  puts("replayed");
}
"""


class Recorder(HostModule):
    """Launches as HostModule does, and keeps what it was asked."""

    def __init__(self, owner: Program, launches: dict[tuple[Program, str], list[bytes]]) -> None:
        super().__init__(owner, 0)
        self.owner, self.launches = owner, launches

    def launch(
        self, kernel: str, grid: Grid, block: int, shared: int, arguments: Sequence[Tensor | int]
    ) -> None:
        name, real = kernel.removesuffix(">").split("<")
        numbers = [*(*grid, 1, 1)[:3], block, 1, 1, shared, len(arguments)]
        parts = [name.encode().ljust(64, b"\0"), *(n.to_bytes(4, "little") for n in numbers)]
        for value in arguments:
            if isinstance(value, Tensor):
                content = value.contiguous().numpy().tobytes()
                parts += [_int(1, 4), _int(len(content), 8), content]
            else:
                parts += [_int(0, 4), _int(value, 8)]
        self.launches.setdefault((self.owner, real), []).append(b"".join(parts))
        super().launch(kernel, grid, block, shared, arguments)


def _int(value: int, size: int) -> bytes:
    return value.to_bytes(size, "little", signed=True)


def record() -> dict[tuple[Program, str], list[bytes]]:
    """Run small cases of all operators; the launches of each source and precision."""
    launches: dict[tuple[Program, str], list[bytes]] = {}
    made: dict[Program, Recorder] = {}

    def module(self: Program, device: torch.device) -> Recorder:  # noqa: ARG001
        return made.setdefault(self, Recorder(self, launches))

    original, Program._module = Program._module, module  # type: ignore[method-assign]
    try:
        case = convolutions.Case(convolutions.UNEVEN, SINGLE, 4)
        case.forward()
        case.backward()
        seconds.second(cuda_double_backward, case, seconds.probes(case, "xYbK"))
        case = convolutions.Case(seconds.MANY, SINGLE)
        seconds.second(cuda_double_backward, case, seconds.probes(case, "xYb"))
        case = convolutions.Case(tables.SMALL, SINGLE, 3)
        case.forward()
        case.backward()
        rows, index, rowptr = segments.example(SINGLE, 3)
        cuda_segment_sum(rows, index, rowptr)
        cuda_segment_shares(rows, rows[:, 0].contiguous(), index, rowptr, 1e-16)
        rotations.Case(RotationSignature(2, 1), dtype=SINGLE, n_edges=12).kernels()
        operators.Case(dtype=SINGLE, n_edges=12).kernels()
        forces.Case(60, 9, SINGLE).kernels()
        products.Case(5, 3, 70, 3, channels=50, dtype=SINGLE).kernels()
        gated.Case(SphereBasis(2, 1, True), dtype=SINGLE).kernels()
    finally:
        Program._module = original  # type: ignore[method-assign]
    return launches


def replay(
    owner: Program, real: str, launches: list[bytes], sanitizer: str, at_once: int, change: Change
) -> tuple[bool, str]:
    """Whether a sanitizer finds nothing, and what it says."""
    module = HostModule(owner, 0, change)
    names = ", ".join(f'{{"{name}", host_{name}}}' for name in KERNEL.findall(module.text))
    whole = f'#include "prelude.cuh"\n{module.text}\n{entries(module.text, real)}\n'
    whole += f"{MAIN.replace('KERNELS', names)}"
    with tempfile.TemporaryDirectory() as work:
        for name, header in module.headers.items():
            (Path(work) / name).write_text(header, encoding="utf-8")
        (Path(work) / "text.cpp").write_text(whole, encoding="utf-8")
        (Path(work) / "launches").write_bytes(_int(len(launches), 4) + b"".join(launches))
        command = ["g++", "-std=c++17", "-O1", "-g", "-w", "-pthread", f"-fsanitize={sanitizer}",
                   "-DHOST_SHIM", "-DSHIM_THREADS", f"-I{work}", f"-I{HERE}",
                   f"{work}/text.cpp", "-o", f"{work}/program"]  # fmt: skip
        subprocess.run(command, check=True)
        fixed = [found] if (found := shutil.which("setarch")) else []
        fixed += ["-R"] if fixed else []  # addresses that ThreadSanitizer can map
        done = subprocess.run(
            [*fixed, f"{work}/program", f"{work}/launches", str(at_once)],
            capture_output=True, text=True, check=False, timeout=600,
        )  # fmt: skip
    said = done.stderr + done.stdout
    return done.returncode == 0 and "replayed" in done.stdout, said


def unchanged(text: str) -> str:
    """The text as it is."""
    return text


def no_barriers(text: str) -> str:
    """Take all barriers out."""
    return text.replace("__syncthreads();", "")


def one_row_too_many(text: str) -> str:
    """Let the edges of an atom or segment, or channels, end where those of the next do."""
    text = text.replace("[atom + 1]", "[atom + 2]").replace("[segment + 1]", "[segment + 2]")
    return text.replace("column.row *", "(column.row + 1) *")


CHECKS = (
    # sanitizer, blocks at once, what is changed in the text
    ("thread", 1, unchanged),
    ("thread", 3, unchanged),
    ("address", 1, unchanged),
    ("thread", 1, no_barriers),
    ("address", 1, one_row_too_many),
)


def main() -> int:
    """Print one line for each source and check; returns 1 if one of them is not as it must be."""
    if shutil.which("g++") is None:
        print("g++ is not installed: CUDA text cannot run on the host")
        return 1
    wrong = 0
    noticed: dict[str, bool] = {}  # mistakes in sources; one program of a source must show each
    for (owner, real), launches in record().items():
        text = HostModule(owner, 0).text
        for sanitizer, at_once, change in CHECKS:
            mistake = f"{owner.file}, {change.__name__.replace('_', ' ')}"
            if change is not unchanged and (change(text) == text or noticed.get(mistake)):
                continue
            clean, said = replay(owner, real, launches, sanitizer, at_once, change)
            print(
                f"{mistake}: {len(launches)} launches, {sanitizer} sanitizer, "
                f"{at_once} at once: {'clean' if clean else 'reported'}",
                flush=True,
            )
            if change is not unchanged:
                noticed[mistake] = not clean
            elif not clean:
                wrong += 1
                print(said[:4000])
    missed = [mistake for mistake, seen in noticed.items() if not seen]
    print("\n".join(f"NOT NOTICED: {mistake}" for mistake in missed))
    return 1 if wrong or missed else 0


if __name__ == "__main__":
    sys.exit(main())
