"""What kvcomp reads of vLLM's config, and the one thing that it sets there."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from kvcomp.errors import SpecError
from kvcomp.stages.stack import Stack

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

VARIABLE = "KVCOMP_STACK"
OPTION = "kvcomp"


def stack_of(config: VllmConfig) -> Stack | None:
    """The stack of `--additional-config '{"kvcomp": {"stack": ...}}'`, or of KVCOMP_STACK; None where neither is."""
    given = config.additional_config
    options = given.get(OPTION) if isinstance(given, dict) else None
    if options is not None and (not isinstance(options, dict) or set(options) != {"stack"}):
        raise SpecError(f'additional_config["{OPTION}"]={options!r}: expected {{"stack": "kivi(bits=2)"}}')
    spec = options["stack"] if options is not None else os.environ.get(VARIABLE)
    return Stack.parse(spec) if spec else None


def report_prompt_lengths(model: ModelConfig) -> None:
    """Let vLLM tell attention backends how long each request's prompt is, which policies must know.

    Its runners (V1 and V2) report prompt lengths only if the model's R-SWA window is set, and offer no other switch:
    the window set here is as long as the longest request, so that it leaves nothing out.
    """
    model.model_arch_config.rswa_window = model.max_model_len
