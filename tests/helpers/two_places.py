"""Two devices on a machine with one: tensors are marked with their place, and operations on both raise."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakIdKeyDictionary


class Moves(TorchFunctionMode):
    """Takes the mark from what is brought to another device or to the host, which dispatch does not see here."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        to = [*args[1:2], (kwargs or {}).get("device")]
        if func is torch.Tensor.cpu or (func is torch.Tensor.to and any(isinstance(x, torch.device | str) for x in to)):
            with _disable_current_modes():
                return result.clone()
        return result


class TwoPlaces(TorchDispatchMode):
    """Inside, what is computed from a marked tensor has its mark. Tensors without one are of the host or were moved:
    they go anywhere. Single numbers do, too."""

    def __init__(self) -> None:
        super().__init__()
        self.places = WeakIdKeyDictionary()
        self.moves = Moves()

    def __enter__(self) -> TwoPlaces:
        self.moves.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.moves.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [x for x in tree_leaves((args, kwargs or {})) if isinstance(x, torch.Tensor)]
        found = {place for x in given if x.dim() and (place := self.places.get(x)) is not None}
        if len(found) > 1:
            raise RuntimeError(f"{func} is given tensors of {sorted(found)}")
        result = func(*args, **(kwargs or {}))
        for place in found:
            self.mark(result, place)
        return result

    def mark(self, tensors: Any, place: str) -> None:
        for x in tree_leaves(tensors):
            if isinstance(x, torch.Tensor):
                self.places[x] = place

    def moved(self, tensors: Any, place: str) -> Any:
        """Copies that lie at another place."""
        with _disable_current_modes():
            copies = tree_map_only(torch.Tensor, torch.clone, tensors)
        self.mark(copies, place)
        return copies

    def spread(self, model: Any) -> None:
        """Put a Llama's second layer, and what comes after it, at another place than the rest."""
        inner = model.model
        self.mark([*model.parameters(), *model.buffers()], "first")
        for module in (inner.layers[1], inner.norm, model.lm_head):
            self.mark([*module.parameters(), *module.buffers()], "second")

        def move(_: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            others = {name: value for name, value in kwargs.items() if name != "past_key_values"}
            return self.moved(args, "second"), kwargs | self.moved(others, "second")

        inner.layers[1].register_forward_pre_hook(move, with_kwargs=True)
        model.register_forward_hook(lambda *call: self._back(call[2]))

    def _back(self, output: Any) -> Any:
        output.logits = self.moved(output.logits, "first")
        return output
