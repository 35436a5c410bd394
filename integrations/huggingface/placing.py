"""Where a model's weights go, and what they become there: `Loading` as transformers takes it."""

from __future__ import annotations

import importlib.util
import json
import re
from typing import Any

import torch

from kvcomp.errors import KvcompError, UnsupportedError
from kvcomp.files import expanded, readable, reason
from kvcomp.text import quote, shorten, visible

from ..loading import DEVICE_MAPS, Loading

LARGEST = 1 << 24  # bytes of a file of a map
LIBRARIES = {"torchao": "torchao", "bnb": "bitsandbytes"}  # packages by the start of a quantization's name


def usable_device(asked: str, device: Any) -> torch.device:
    """The device that was asked for.

    Raises:
        KvcompError: there is none of that name, or it cannot hold tensors here.
    """
    try:
        on = torch.device(device)
        torch.empty(0, dtype=torch.float32, device=on)
    except (RuntimeError, AssertionError, TypeError, ValueError, ImportError) as error:
        told = shorten(visible(str(error).partition("\n")[0].strip().rstrip(".")))
        raise KvcompError(f"{asked}: no such device here ({told}): name one that torch can use, such as cpu") from error
    return on


def main_device(loading: Loading) -> torch.device:
    """The device that was asked for; otherwise the first GPU, or the CPU where there is none.

    Raises:
        KvcompError: this machine lacks it.
    """
    if loading.device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on = usable_device(f"device={quote(loading.device)}", loading.device)
    if on.type == "meta":
        raise KvcompError("device='meta': it holds no numbers, so that no model runs there: name another, such as cpu")
    return on


def dtype_of(loading: Loading) -> torch.dtype:
    """The dtype of weights and cache."""
    named = loading.dtype or ("float32" if main_device(loading).type == "cpu" else "bfloat16")
    dtype: torch.dtype = getattr(torch, named)
    return dtype


def placement(loading: Loading) -> Any:
    """`device_map` as transformers takes it; None without one.

    Raises:
        KvcompError: accelerate is not installed, or the map is neither a known name nor a file with one.
    """
    given = loading.device_map
    if given is None:
        return None
    if given in DEVICE_MAPS:
        found: Any = given
    else:
        expected = f'{", ".join(DEVICE_MAPS)}, or a JSON file of devices by module, such as {{"": "cpu"}}'
        told = f"device-map: {quote(given)}"
        try:
            file = readable(expanded(given))
            found = json.loads(file.read_text("utf-8")) if file.stat().st_size <= LARGEST else None
        except OSError as error:
            raise KvcompError(f"{told} cannot be read ({reason(error)}): expected {expected}.") from error
        except (ValueError, RecursionError) as error:
            raise KvcompError(f"{told} is no JSON: expected {expected}.") from error
        if not isinstance(found, dict) or not found or not all(_is_place(place) for place in found.values()):
            raise KvcompError(f"{told} has no devices by module: expected {expected}.")
        for place in dict.fromkeys(place for place in found.values() if place not in ("cpu", "disk")):
            usable_device(f"{told}: {quote(place)}", place)
    _require("device-map", given, "accelerate")
    return found


def _is_place(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool) and value >= 0)


def quantization_config(loading: Loading, dtype: torch.dtype) -> Any:
    """transformers' config of the quantization that was asked for; None without one.

    Raises:
        KvcompError: its library is not installed.
        UnsupportedError: it does not run on that device.
    """
    given = loading.quantization
    if given is None:
        return None
    _require("quantization", given, LIBRARIES[given.partition("-")[0]], "accelerate")
    if given == "torchao-int4" and loading.device_map is None and main_device(loading).type != "cuda":
        raise UnsupportedError(
            f"quantization: torchao-int4 has kernels for NVIDIA GPUs alone, and the device is "
            f"{main_device(loading)}: use torchao-int8, or a GPU"
        )
    if given == "torchao-int4" and dtype != torch.bfloat16:
        raise UnsupportedError(
            f"quantization: torchao-int4 computes in bfloat16, and dtype is {loading.dtype}: leave out --dtype, or use "
            "torchao-int8"
        )
    from transformers import BitsAndBytesConfig, TorchAoConfig

    if given == "bnb-8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    if given == "bnb-4bit":
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig

    if given == "torchao-int8":
        return TorchAoConfig(Int8WeightOnlyConfig())
    # Groups of 32 divide the widths of all models; torch itself has the kernels of tiles.
    return TorchAoConfig(Int4WeightOnlyConfig(group_size=32, int4_packing_format="tile_packed_to_4d"))


def quantized_as(config: Any) -> str | None:
    """How a checkpoint is quantized, in words; None where it is not."""
    own = getattr(config, "quantization_config", None)
    method = own.get("quant_method") if isinstance(own, dict) else getattr(own, "quant_method", None)
    return None if own is None else f"quantized already ({getattr(method, 'value', method)})"


def _require(option: str, value: str, *packages: str) -> None:
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise KvcompError(
            f"{option}: {quote(value)} needs {' and '.join(missing)}: pip install {' '.join(missing)}, or leave out "
            f"--{option}"
        )


def refuse_offloaded(model: torch.nn.Module, loading: Loading, name: str) -> None:
    """Raise an UnsupportedError where a map left weights on the host or on a disk, fetched for every step."""
    away = [key for key, parameter in model.named_parameters() if parameter.is_meta]
    if away:
        raise UnsupportedError(
            f"device-map: {quote(loading.device_map)} leaves {len(away)} parameters of {quote(name)} outside of the "
            f"devices that compute, such as {quote(away[0])}, to be fetched in every step, where no stage can read "
            "them: give --quantization, a smaller model, or a map that has room for all of it"
        )


def layer_devices(model: Any, layers: int, default: torch.device) -> list[torch.device]:
    """Where each layer of the decoder computes, for a model that a map spreads over several devices."""
    places = getattr(model, "hf_device_map", None) or {}
    if len(set(map(str, places.values()))) < 2:
        return [default] * layers
    found: dict[int, torch.device] = {}
    for key, parameter in model.get_decoder().named_parameters():
        if (at := re.search(r"(?:^|\.)layers\.(\d+)\.", key)) is not None:
            found.setdefault(int(at[1]), parameter.device)
    return [found.get(i, default) for i in range(layers)]
