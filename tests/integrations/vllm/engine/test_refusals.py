"""What only an engine can tell: a stack that its workers would settle differently, and vLLM without a stack."""

from __future__ import annotations

from typing import Any

import pytest

from kvcomp.errors import KvcompError
from kvcomp.integrations.vllm import plugin
from kvcomp.integrations.vllm.config import VARIABLE


def test_whole_bits_only(engine: Any) -> None:
    """What a codec would settle by the text it sees first, each start of a server would settle anew."""
    assert "settles on channels" in engine("turboquant(bits=2.5)", [])["error"]


def test_without_a_stack_the_backend_is_vllms_own(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    monkeypatch.delenv(VARIABLE, raising=False)
    plugin.register()
    plugin.register()
    assert AttentionBackendEnum.CPU_ATTN.get_class() is CPUAttentionBackend
    with pytest.raises(KvcompError, match="there is no stack"):
        AttentionBackendEnum.CUSTOM.get_class()
