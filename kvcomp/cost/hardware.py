"""Accelerators by their public specifications: what a roofline needs of them."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches

from kvcomp.errors import KvcompError
from kvcomp.text import quote


@dataclass(frozen=True)
class Gpu:
    """One device. tflops: dense bf16 matrix peak with fp32 accumulation, TFLOP/s; bandwidth: TB/s; memory: GB (1e9 B).

    All are peaks of the data sheet named in `source`; a copy reaches 85-93 % of the bandwidth.
    """

    name: str
    tflops: float
    bandwidth: float
    memory: float | None = None
    source: str = "given"

    def __post_init__(self) -> None:
        for field in ("tflops", "bandwidth", "memory"):
            value = getattr(self, field)
            if value is not None and not 0 < value < float("inf"):
                raise KvcompError(f"gpu: {field}={value!r} must be a positive number")

    @property
    def ridge(self) -> float:
        """FLOP per byte above which the matrix units are the limit, below which the memory is."""
        return self.tflops / self.bandwidth


GPUS = (
    Gpu("H100", 989, 3.35, 80, "NVIDIA H100 data sheet, SXM: 1,979 TFLOP/s with sparsity"),
    Gpu("H200", 989, 4.8, 141, "NVIDIA H200 data sheet, SXM: 1,979 TFLOP/s with sparsity"),
    Gpu("B200", 2250, 8.0, 180, "NVIDIA DGX B200 data sheet / 8: 36 PFLOP/s with sparsity, 64 TB/s, 1,440 GB"),
    Gpu("A100-40GB", 312, 1.555, 40, "NVIDIA A100 data sheet, SXM"),
    Gpu("A100-80GB", 312, 2.039, 80, "NVIDIA A100 data sheet, SXM"),
    Gpu("RTX 4090", 165.2, 1.008, 24, "NVIDIA Ada architecture white paper: bf16 with fp32 accumulation"),
    Gpu("RTX 5090", 209.5, 1.792, 32, "NVIDIA RTX Blackwell architecture white paper: bf16 with fp32 accumulation"),
    Gpu("MI300X", 1307.4, 5.3, 192, "AMD Instinct MI300X data sheet"),
    # Apple publishes no FLOP/s: 80 cores x 128 lanes x 2 x 1.38 GHz, the same in fp16 and fp32
    Gpu("M3 Ultra", 28.3, 0.819, 512, "Apple: 819 GB/s, up to 512 GB; FLOP/s computed from 80 cores at 1.38 GHz"),
    # NVIDIA publishes 1 PFLOP/s of sparse FP4; bf16 is an eighth of it
    Gpu("DGX Spark", 125, 0.273, 128, "NVIDIA DGX Spark data sheet: 1 PFLOP/s sparse FP4, of which an eighth"),
)
DEFAULTS = {"a100": "A100-80GB"}  # names that several devices share


def find_gpu(name: str) -> Gpu:
    """The known device of that name; case, spaces, hyphens and underscores do not matter.

    Raises:
        KvcompError: an unknown name, with the known ones.
    """
    known = {_plain(gpu.name): gpu for gpu in GPUS}
    known |= {_plain(short): known[_plain(full)] for short, full in DEFAULTS.items()}
    found = known.get(_plain(name))
    if found is None:
        near = get_close_matches(_plain(name), known, n=1)
        hint = f"did you mean {known[near[0]].name!r}? " if near else ""
        names = ", ".join(gpu.name for gpu in GPUS)
        raise KvcompError(
            f"gpu: {quote(name)} is not known: {hint}Known: {names}. "
            "For another give --tflops, --bandwidth and --memory."
        )
    return found


def _plain(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum())
