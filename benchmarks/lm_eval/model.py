"""lm-eval: any of its tasks, answered from a compressed cache.

lm-eval finds models only in its own package, so its command runs through this module, which adds the model `kvcomp`:

    python -m kvcomp.benchmarks.lm_eval run --model kvcomp \\
        --model_args "pretrained=smollm2-135m,stack=kivi(bits=4) + window(recent=64)" --tasks arc_easy --limit 20

In `--model_args` a comma separates arguments, so a stage with several of its own is written with `;` between them:
`stack=int(bits=4;basis=hadamard)`. The tasks of `kvcomp.benchmarks.lm_eval.tasks` are known to it too.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from lm_eval._cli import HarnessCLI
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import setup_logging
from torch import Tensor
from tqdm import tqdm

from kvcomp.errors import KvcompError
from kvcomp.integrations.huggingface import CompressedCache, prefill
from kvcomp.integrations.huggingface.forward import generating_with, with_cache
from kvcomp.integrations.huggingface.models import load_model
from kvcomp.stages.stack import Stack, StackLike

from . import tasks as lm_eval_tasks


@register_model("kvcomp")
class KvcompLM(HFLM):
    """A Hugging Face model whose every answer is read from a cache that went through `stack`.

    The context without its last token is prefilled densely into the cache; the last token and all that follows are
    decoded from the compressed cache, for generation and for likelihoods alike, so that the cache is what is measured.

    Args:
        pretrained: as for `kvcomp generate`: an alias, a .gguf file, a folder, a hub id; or a model object.
        stack: a stack, or its spec, where `;` may stand for `,` between the arguments of a stage.
        kwargs: what lm-eval's own `hf` model takes.
    """

    def __init__(self, pretrained: Any, stack: StackLike = "none", tokenizer: Any = None, **kwargs: Any) -> None:
        self.stack = Stack.parse(stack.replace(";", ",") if isinstance(stack, str) else stack)
        if isinstance(pretrained, str):
            wanted = kwargs.pop("device", None)
            device = wanted if wanted and (wanted == "cpu" or torch.cuda.is_available()) else None
            dtype = kwargs.pop("dtype", "auto")
            dtype = getattr(torch, dtype) if isinstance(dtype, str) and dtype != "auto" else None
            pretrained, own = load_model(pretrained, dtype=dtype, device=device)
            tokenizer = tokenizer or own
        super().__init__(pretrained=pretrained, tokenizer=tokenizer, **kwargs)

    def _start(self, context: Tensor, mask: Tensor | None = None) -> CompressedCache:
        """A cache that holds context [B, n] up to its last token."""
        cache = CompressedCache(self.stack, self.model)
        if context.shape[1] > 2:
            mask = None if mask is None else mask[:, :-1]
            prefill(self.model, context[:, :-1], [cache], mask, tokenizer=self.tokenizer)
        return cache

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **generation_kwargs: Any) -> Tensor:
        cache = self._start(context, generation_kwargs.get("attention_mask"))
        result: Tensor = super()._model_generate(
            context, max_length, stop, **generating_with(cache), **generation_kwargs
        )
        return result

    @torch.inference_mode()
    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """Per request (strings, context tokens, continuation tokens): log-likelihood of the continuation, and whether
        it
        is the greedy one. One token at a time, as a decode would, so that selectors act too."""
        results = []
        for strings, context, continuation in tqdm(requests, disable=disable_tqdm, desc="loglikelihood requests"):
            tokens = (context + continuation)[-self.max_length - 1 :]
            ids = torch.tensor([tokens], device=self.device, dtype=torch.int64)
            first = len(tokens) - len(continuation)
            cache = self._start(ids[:, :first])
            fed = cache.get_seq_length()
            rows = []
            for at in range(fed, len(tokens) - 1):
                rows.append(
                    self.model(ids[:, at : at + 1], **with_cache(self.model, cache), use_cache=True).logits[0, -1]
                )
            logits = torch.stack(rows[-len(continuation) :]).float().log_softmax(-1)  # [len(continuation), V]
            wanted = ids[0, first:]
            likelihood = float(logits.gather(1, wanted[:, None]).sum())
            answer = (likelihood, bool((logits.argmax(-1) == wanted).all()))
            results.append(answer)
            if strings is not None:
                self.cache_hook.add_partial("loglikelihood", strings, answer)
        return results


def main() -> None:
    """lm-eval's own command, with the model `kvcomp` and the tasks of kvcomp known to it."""
    setup_logging()
    parser = HarnessCLI()
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        lm_eval_tasks.write(Path(folder))
        _add_tasks(arguments, folder)
        try:
            parser.execute(arguments)
        except KvcompError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)


def _add_tasks(arguments: argparse.Namespace, folder: str) -> None:
    """Let lm-eval read the task files in `folder`, and write no more samples of them than --limit asks for."""
    own = getattr(arguments, "include_path", None)
    arguments.include_path = [own, folder] if own else [folder]
    limit = getattr(arguments, "limit", None)
    if limit and limit >= 1:
        arguments.metadata = {"samples": int(limit)} | (arguments.metadata or {})
