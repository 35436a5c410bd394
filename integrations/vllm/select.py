"""Backends by the name of a member of `AttentionBackendEnum`, chosen when vLLM asks and the config is known.

`select.CPU_ATTN` is kvcomp's backend while an engine with a stack is built, and vLLM's own otherwise.
"""

from __future__ import annotations

from typing import Any

from kvcomp.errors import KvcompError

from .checks import accepted
from .config import stack_of


def __getattr__(name: str) -> Any:
    from vllm.config import get_current_vllm_config_or_none
    from vllm.utils.import_utils import resolve_obj_by_qualname
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    if name not in AttentionBackendEnum.__members__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    config = get_current_vllm_config_or_none()
    stack = None if config is None else stack_of(config)
    if stack is not None:
        from .backend import backend_for

        return backend_for(accepted(config))
    own = AttentionBackendEnum[name].value
    if own is None:
        raise KvcompError(
            f"--attention-backend {name} is kvcomp's, and there is no stack: set KVCOMP_STACK, or pass "
            """--additional-config '{"kvcomp": {"stack": "kivi(bits=2)"}}'"""
        )
    return resolve_obj_by_qualname(own)
