"""What vLLM's engine cannot do with a stack: refused before any memory is taken, with the reason and what to change."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvcomp.architecture import LayerKind, LayerShape, engine_obstacle
from kvcomp.cache.blocks.setup import Setup
from kvcomp.errors import UnsupportedError
from kvcomp.stages import Policy
from kvcomp.stages.stack import Stack

from .config import stack_of
from .fitting import fitted, lacks_file

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def accepted(config: VllmConfig) -> Setup:
    """What `config` asks for.

    Raises:
        SpecError, UnsupportedError: what cannot be done, and what to change.
    """
    stack = stack_of(config)
    assert stack is not None
    setup = _setup(stack, config)
    model, ranks = config.model_config, config.parallel_config.tensor_parallel_size
    check_layer(setup, LayerKind.LATENT if model.use_mla else LayerKind.FULL, setup.dim, setup.dim)
    check_stages(setup, ranks)
    check_engine(setup, config)
    return _setup(fitted(stack, model), config)


def _setup(stack: Stack, config: VllmConfig) -> Setup:
    model, speculative = config.model_config, config.speculative_config
    drafts = 0 if speculative is None else speculative.num_speculative_tokens or 0
    sizes = model.get_total_num_hidden_layers(), model.get_head_size()
    kinds = getattr(model.hf_text_config, "layer_types", None) or ["sliding_attention"]
    hybrid = model.get_sliding_window() is not None and "sliding_attention" in kinds
    return Setup(stack, *sizes, model.dtype, drafts, config.cache_config.enable_prefix_caching, hybrid)


def check_layer(setup: Setup, kind: LayerKind, k_dim: int, v_dim: int) -> None:
    """Raise an UnsupportedError where blocks cannot hold a layer of this kind, with heads of so many channels."""
    why = engine_obstacle([LayerShape(k_dim=k_dim, v_dim=v_dim, kind=kind)], setup.dim)
    if why is not None:
        raise UnsupportedError(
            f"{setup.stack}: a layer of the model {why}, which compressed pages do not serve in vLLM: serve this model "
            "without a stack"
        )


def check_engine(setup: Setup, config: VllmConfig) -> None:
    """Raise an UnsupportedError where an engine's settings and the stack do not go together."""
    parallel, cache = config.parallel_config, config.cache_config
    if cache.cache_dtype not in ("auto", "bfloat16", "float16"):
        raise UnsupportedError(
            f"{setup.stack}: --kv-cache-dtype {cache.cache_dtype} would quantize what the stack quantizes: leave it out"
        )
    if parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
        raise UnsupportedError(f"{setup.stack}: context parallelism splits a request's pages: leave it out")
    if config.kv_transfer_config is not None and setup.slots:
        raise UnsupportedError(
            f"{setup.stack} keeps tokens of each request in a window of its own, and a KV connector moves pages "
            "alone: leave out --kv-transfer-config, or use a stack that writes token by token, such as int(bits=4) "
            "or turboquant(bits=4)"
        )
    # A block size that nobody asked for is final only once the platform has had its say.
    if cache.user_specified_block_size and cache.block_size % setup.page_size:
        raise UnsupportedError(
            f"{setup.stack}: --block-size {cache.block_size} is no multiple of the stack's pages of "
            f"{setup.page_size} tokens: use --block-size {setup.page_size}"
        )


def check_stages(setup: Setup, ranks: int = 1) -> None:
    """Raise an UnsupportedError where a stack cannot be served, or not with the KV heads over so many ranks."""
    stack, quantizer = setup.stack, setup.stack.quantizer
    for policy in stack.policies:
        _check_policy(setup, policy, ranks)
    shape = setup.shape(1, 0)
    if not setup.exact_dtype.is_floating_point:
        raise UnsupportedError(
            f"window(bits={stack.window.bits}): windows in vLLM's blocks hold floating-point numbers: set bits=16"
        )
    if quantizer.needs_queries and not lacks_file(quantizer):
        raise UnsupportedError(
            f"{quantizer.name} fits itself to each request, which has no place in vLLM's blocks: use klt, int, kivi or "
            "turboquant"
        )
    selector = stack.selector
    if (
        selector is not None
        and not lacks_file(selector)
        and (selector.needs_queries or any(selector.index_bytes(shape)))
    ):
        raise UnsupportedError(
            f"{selector.name} fits itself to each request, which has no place in vLLM's blocks: use quest or moba"
        )
    for stage in (selector, *stack.policies):
        if stage is not None and ranks > 1 and getattr(stage, "calibration", None) is not None:
            raise UnsupportedError(f"{stage.name}: a calibration knows all heads, and a rank has some: use one rank")


def _check_policy(setup: Setup, policy: Policy, ranks: int) -> None:
    if policy.prefill_chunk is not None:
        raise UnsupportedError(
            f"{policy.name}(chunk={policy.prefill_chunk}): vLLM decides how prompts are cut "
            "(--max-num-batched-tokens): leave chunk out"
        )
    if policy.keeps_newest is not None:
        return
    once = "use snapkv or another policy that chooses once, when the prompt is in"
    why = None
    if policy.needs_model or policy.reconstructs is not None:
        why = f"needs the model beside queries, keys and values, which vLLM's attention does not see: {once}"
    elif not policy.uniform:
        why = (
            "keeps other numbers of tokens in each layer or head, and a block of vLLM serves all of them alike: "
            "use snapkv or another policy with equal budgets"
        )
    elif policy.voters is None and not policy.averages:
        why = f"scores with all queries of the prompt, and vLLM may cut it: {once}"
    elif policy.expires and policy.limit is None:
        why = f"lets pages go while generating, and sets no limit by which vLLM could count them: {once}"
    elif policy.watches and setup.drafts:
        why = (
            "lets pages go while generating, which a rejected draft cannot take back: set hold=false, or leave out "
            "--speculative-config"
        )
    elif len(setup.stack.policies) > 1:
        why = "has to be the only policy of the stack in vLLM: leave out the others"
    elif ranks > 1 and "heads" in policy.same_tokens:
        why = "keeps the same tokens in all heads, and a rank knows its own alone: set heads=own, or use one rank"
    if why is not None:
        raise UnsupportedError(f"{policy.name} {why}")
