"""Hugging Face transformers: a stack as a drop-in cache: `cache=`, or `past_key_values=` before 5.24.

How it hooks in: a layer's `update` keeps a chunk's K and V as *pending* and returns two light handles in their place
(handles.py); the attention function registered for the model (hook.py) recognises the handles, runs the model's own
attention for the first prefill and attention over the compressed parts for everything later, and then the chunk is
committed: score, evict, encode. A plain tensor instead of a handle (another cache, a recurrent layer) goes to the
model's own attention.
"""

from .accounting import memory_of
from .ask import Answers, ask
from .cache import CompressedCache
from .compact import Compaction
from .prefill import Prefilled, prefill

__all__ = ["Answers", "Compaction", "CompressedCache", "Prefilled", "ask", "memory_of", "prefill"]
