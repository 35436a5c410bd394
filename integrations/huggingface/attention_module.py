"""What a model's attention modules tell: their rotary embedding and their output projection."""

from __future__ import annotations

import inspect
import sys
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from kvcomp.errors import UnsupportedError

from .adapters import active_adapters

OUTPUT_PROJECTIONS = ("o_proj", "out_proj", "dense")
OTHER_MODALITIES = ("Vision", "Audio", "Image")
ROTATION_VARIES = ("afmoe", "cohere2", "cohere2_moe", "exaone4", "exaone_moe", "flint", "kolibri1", "llama4", "zamba2")


def output_projection(module: torch.nn.Module, query_heads: int, v_dim: int) -> Tensor | None:
    """W_o [Hq, Dv, M]: a view of the output projection's weight, or a dense copy where that is quantized or has
    adapters; None where the module has none of that shape."""
    for name in OUTPUT_PROJECTIONS:
        projection = getattr(module, name, None)
        weight = _dense_weight(projection, query_heads * v_dim) if isinstance(projection, torch.nn.Module) else None
        if weight is not None:
            return rearrange(weight, "m (h v) -> h v m", h=query_heads)
    return None


@torch.no_grad()
def _dense_weight(projection: torch.nn.Module, width: int) -> Tensor | None:
    """W [M, width] of a projection that maps x to x W' plus a bias; None where it maps no vectors of that width."""
    weight = getattr(projection, "weight", None)
    if not isinstance(weight, Tensor):
        return None
    if type(weight) in (Tensor, torch.nn.Parameter) and weight.is_floating_point() and not active_adapters(projection):
        return weight.detach() if weight.dim() == 2 and weight.shape[1] == width else None
    if getattr(projection, "in_features", None) != width:
        return None
    dtype = weight.dtype if weight.is_floating_point() else torch.get_default_dtype()
    unit = torch.eye(width, dtype=dtype, device=weight.device)
    matrix: Tensor = (projection(unit) - projection(torch.zeros_like(unit[:1]))).mT
    return matrix


class AttentionModule:
    """A `ModelPart`: one attention module of a transformers model, whose queries have `query_heads` heads."""

    def __init__(self, module: torch.nn.Module, query_heads: int, v_dim: int) -> None:
        self.module, self.query_heads, self.v_dim = module, query_heads, v_dim
        self.config: Any = module.config
        self.embedding: Any = None

    def output(self) -> Tensor:
        weight = output_projection(self.module, self.query_heads, self.v_dim)
        if weight is None:
            raise UnsupportedError(
                f"{type(self.module).__name__} has no output projection of {self.query_heads} heads x {self.v_dim}: "
                "use a policy without critical=true"
            )
        return weight

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        if self.embedding is None:
            with x.device:  # where it computes its frequencies
                self.embedding = self._embedding()
        options = {"layer_type": self._layer_type()} if self._by_layer_type() else {}
        cos, sin = self.embedding(x.float(), positions.abs()[None], **options)  # [1, n, R]
        scaling = (cos.square() + sin.square()).amax(-1, keepdim=True).sqrt()  # yarn's factor, which q and k have
        cos, sin = cos / scaling, sin / scaling * positions.sign()[None, :, None]
        turn: Any = vars(sys.modules[type(self.module).__module__])["apply_rotary_pos_emb"]
        flat = x.reshape(1, -1, *x.shape[-2:])
        if "k" not in inspect.signature(turn).parameters:
            raise self._unknown("its rotary embedding is not applied to q and k together")
        try:
            turned = turn(flat, flat[:, :1], cos, sin)[0]
        except RuntimeError:  # the first channels only, and the module itself splits them off
            part = cos.shape[-1]
            turned = torch.cat([turn(flat[..., :part], flat[:, :1, :, :part], cos, sin)[0], flat[..., part:]], -1)
        shaped: Tensor = turned.view(x.shape)
        return shaped

    def _embedding(self) -> torch.nn.Module:
        config, names = self.config, vars(sys.modules[type(self.module).__module__])
        if not getattr(self.module, "use_rope", True):
            raise self._unknown("some of its layers have no rotary embedding")
        if config.model_type in ROTATION_VARIES:
            raise self._unknown("its layers differ in their rotary embedding")
        found = [
            thing
            for name, thing in names.items()
            if isinstance(thing, type)
            and name.endswith("RotaryEmbedding")
            and not any(other in name for other in OTHER_MODALITIES)
        ]
        if len(found) != 1 or "apply_rotary_pos_emb" not in names:
            raise self._unknown("its modeling file has no one rotary embedding")
        made: torch.nn.Module = found[0](config)
        return made

    def _by_layer_type(self) -> bool:
        return "layer_type" in inspect.signature(type(self.embedding).forward).parameters

    def _layer_type(self) -> str:
        return str(self.config.layer_types[self.module.layer_idx])

    def _unknown(self, why: str) -> UnsupportedError:
        return UnsupportedError(
            f"{self.config.model_type}: {why}, so its queries and keys cannot be turned to other positions: "
            "use a policy that takes them as they are, such as snapkv"
        )
