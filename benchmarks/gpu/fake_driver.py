"""A driver for triton that compiles for a GPU that is not there, and launches nothing: all that the host does is real.

`python -m kvcomp.benchmarks.gpu.fake_driver [STACK ...]` prints the CPU time of one attention call, and of one step of
a layer, over pages and a window, and which kernels each launches. Results of kernels are whatever memory had.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.driver import driver

from kvcomp.cache.layer import LayerStore
from kvcomp.kernels import backends, dispatch
from kvcomp.kernels.triton.compiling import LIMITS
from kvcomp.kernels.triton_backend import Triton
from kvcomp.stages.stack import Stack

STACKS = ("kivi(bits=4)", "turboquant(bits=4)", "klt(bits=4)")  # a selector would choose from what nobody computed
HEADS, GROUP, DIM, TOKENS = 8, 4, 128, 4120  # a window besides pages
launched: Counter[str] = Counter()
loaded: list[str] = []  # kernels, as often as one was compiled for other constants


class Utils:
    """What triton asks of a device."""

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        loaded.append(name)
        return 0, 0, 0, 0, 1024

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": LIMITS[90] << 10, "multiprocessor_count": 132, "warpSize": 32, "max_num_regs": 65536}


class Launcher:
    """Counts what would be launched."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.name = metadata.name.removesuffix("_kernel")

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        launched[self.name] += 1


class FakeDriver(DriverBase):
    """An H200's, without it: tensors lie on the host."""

    def __init__(self, capability: int = 90) -> None:
        self.capability, self.utils, self.launcher_cls = capability, Utils(), Launcher

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        return torch.cuda

    def get_benchmarker(self) -> Any:
        raise NotImplementedError

    def get_empty_cache_for_benchmark(self) -> Any:
        raise NotImplementedError

    def clear_cache(self, cache: Any) -> None:
        pass


def install() -> None:
    """From now on triton compiles for sm_90 and launches nothing."""
    driver.set_active(FakeDriver())


def calls(spec: str) -> dict[str, Callable[[], Any]]:
    """An attention call, and a decode step of a layer with its append, over `TOKENS` tokens of Qwen3-8B's geometry."""
    store = LayerStore(Stack.parse(spec).plan(4, 36))
    k, v = (torch.randn(1, HEADS, TOKENS, DIM, dtype=torch.bfloat16, device="cpu") for _ in range(2))
    seen = (
        torch.randn(1, HEADS * GROUP, TOKENS, DIM, dtype=torch.bfloat16, device="cpu")
        if store.plan.needs_queries
        else None
    )
    store.start(k, v)
    store.write(k, v, None, seen, 0.1)
    store.end_prompt()
    q = torch.randn(HEADS, GROUP, DIM, dtype=torch.bfloat16, device="cpu")
    storage = store.storage
    records, tokens = storage.records, storage.view().tokens
    what = storage.pool.data, *storage.table.held(), records.layout, records.codec

    def attend() -> object:
        return dispatch.attend_pages(q, *what, 0.1, tokens=tokens, host=False)

    def layer() -> object:
        return store.attend(q.view(1, HEADS * GROUP, 1, DIM), 0.1)

    return {"attend": attend, "layer": layer}


def host_ms(call: Callable[[], Any], times: int = 200) -> tuple[float, dict[str, int]]:
    """CPU time of a call, the least of five rounds, and what one launches."""
    for _ in range(20):
        call()
    launched.clear()
    best = float("inf")
    for _ in range(5):
        start = time.process_time()
        for _ in range(times):
            call()
        best = min(best, (time.process_time() - start) / times)
    return 1e3 * best, {name: count // (5 * times) for name, count in launched.items()}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m kvcomp.benchmarks.gpu.fake_driver", description=__doc__)
    parser.add_argument("stack", nargs="*", default=list(STACKS))
    options = parser.parse_args()
    install()
    torch.set_num_threads(1)
    with torch.no_grad():
        for spec in options.stack:
            for name, call in calls(spec).items():
                with backends.using(Triton(anywhere=True)):
                    ms, kernels = host_ms(call)
                print(
                    json.dumps({"stack": spec, "call": name, "host_ms": round(ms, 4), "launches": kernels}), flush=True
                )


if __name__ == "__main__":
    main()
