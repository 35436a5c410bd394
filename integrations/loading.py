"""How a model is loaded: the options that every command has which loads one. No library is imported here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kvcomp.errors import KvcompError
from kvcomp.text import is_plain, quote

DTYPES = ("float32", "bfloat16", "float16")
QUANTIZATIONS = ("torchao-int8", "torchao-int4", "bnb-8bit", "bnb-4bit")
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")  # and files; transformers makes these maps by itself
ATTENTION = ("sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention")  # others come from the hub


@dataclass(frozen=True)
class Loading:
    """How a model is loaded. Each field is an option of the command line, and its default is what that has.

    dtype: of weights and cache, one of `DTYPES` or torch's dtype; None: float32 on a CPU, bfloat16 on a GPU.
    device: as torch names it, or torch's device; None: the first GPU where there is one, otherwise the CPU.
    device_map: one of `DEVICE_MAPS`, or a JSON file {module: device}, as transformers takes it. Needs accelerate.
    attn_implementation: passed to transformers.
    quantization: of weights that the checkpoint has in full precision, one of `QUANTIZATIONS`.
    revision: branch, tag or commit of a model of the hub.
    trust_remote_code: whether the code that lies beside a checkpoint may run.

    Raises:
        KvcompError: a value outside of these, or two that exclude each other.
    """

    dtype: Any = None
    device: Any = None
    device_map: str | None = None
    attn_implementation: str = "sdpa"
    quantization: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        for name in ("dtype", "device"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, str(value).removeprefix("torch."))
        for name, known in (("dtype", DTYPES), ("quantization", QUANTIZATIONS)):
            value = getattr(self, name)
            if value is not None and value not in known:
                raise KvcompError(f"{option(name)}: {quote(value)} is none of {', '.join(known)}.")
        for name in ("device", "device_map", "attn_implementation", "revision"):
            value = getattr(self, name)
            if value is not None and not (value and is_plain(value)):
                raise KvcompError(f"{option(name)}: {quote(value)} names nothing: leave out --{option(name)}.")
        if self.device is not None and self.device_map is not None:
            raise KvcompError(
                f"device, device-map: {quote(self.device)} is one device and {quote(self.device_map)} places modules "
                "on several: give one of the two."
            )

    def changed(self) -> dict[str, Any]:
        """The fields that are not their defaults."""
        return {name: value for name, value in vars(self).items() if value != getattr(Loading, name)}

    def refuse(self, names: tuple[str, ...], why: str) -> None:
        """Raise a KvcompError if one of the fields of these names is given."""
        given = self.changed()
        for name in names:
            if name in given:
                raise KvcompError(f"{option(name)}: {why}: leave out --{option(name)} {given[name]}.")


DEFAULT = Loading()


def option(name: str) -> str:
    """A field as the command line spells it."""
    return name.replace("_", "-")
