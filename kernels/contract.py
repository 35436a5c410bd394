"""What backends of kernels are asked and given: the operations, the case that decides who serves one, and pages."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from kvcomp.attention import Part, Tokens
from kvcomp.layout import PageLayout
from kvcomp.segments import KVLayout, ReadMap, centres

MOST_ROWS = 128  # queries of a stream; for more it is faster to decode pages for all of them, and multiply matrices
Reduce = Literal["sum", "max"]


class PageCodec(Protocol):
    """What kernels need of a codec: the methods of `stages.Codec` of the same names."""

    @property
    def rotates(self) -> bool: ...
    def kernel_layouts(self) -> KVLayout | None: ...
    def write_layouts(self) -> KVLayout | None: ...
    def kernel_input(self, keys: Tensor, values: Tensor, streams: Tensor) -> tuple[Tensor, Tensor] | None: ...
    def decode(self, page: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]: ...
    def read_query(self, queries: Tensor) -> tuple[Tensor, Tensor | None]: ...
    def read_output(self, output: Tensor) -> Tensor: ...
    def read_maps(self, streams: int) -> tuple[ReadMap, ReadMap] | None: ...


class PagesView(NamedTuple):
    """Pages of a pool uint8 [pages, bytes_per_page]: of ids [S, n] a stream's first counts [S], read as `sides` say.

    in_tokens: counts are of tokens, of a layout that is `tokenwise`, and the last page may be filled in part. sides is
    None where the codec alone can read its pages. token_bias float32 [S, R, n * P]: what is added to each q . k.
    skipped int64 [S], below P: so many tokens at the start of a stream's first page are not seen.
    """

    pool: Tensor
    ids: Tensor
    counts: Tensor
    layout: PageLayout
    sides: KVLayout | None
    in_tokens: bool = False
    token_bias: Tensor | None = None
    skipped: Tensor | None = None


class Case(NamedTuple):
    """What backends decide by: everything that is known on the host before an operation, and can be hashed.

    rows: queries of a stream; dtype: of queries. The others are of pages that are read or written; rotates: as of their
    codec; host: whether PyTorch may look at counts that lie on the host.
    """

    sides: KVLayout | None
    device: torch.device
    rows: int = 1
    dtype: torch.dtype | None = None
    layout: PageLayout | None = None
    rotates: bool = False
    lse_of_pages: bool = False
    in_tokens: bool = False
    host: bool = True

    @property
    def obstacle(self) -> str | None:
        """Why no kernel serves it, whatever the backend; None: one may."""
        if self.rows > MOST_ROWS:
            return f"{self.rows} queries of a stream are more than {MOST_ROWS}"
        if self.layout is None:
            return None
        if self.sides is None:
            return "the codec does not tell kernels how to read its pages"
        if centres(self.sides[1]):
            return "values less a centre"  # of latents, in pages of caches saved when those were centred
        return None if all(side.channels for side in self.sides) else "keys or values of no channels"


class Backend:
    """Kernels of one kind, which serve those operations that a subclass has.

    An operation takes what its entry takes, a function of the same name in `dispatch`, `select` or `received`, but for

      attend(queries, pages: PagesView, codec, case, scale, softcap, tokens, workspace), with tokens that it `joins`
      attend_tokens(queries, tokens, scale, softcap, prior, workspace, host)
      write(pool, ids, keys, values, sides, layout, rows), with K and V as `Codec.kernel_input` gives them

    `reason` decides by the case. Attention and `append` may still decline what they are given, with None or False as
    result: then nothing was done, and the next backend is asked.
    """

    name: str
    attend: Callable[..., Part | None]
    attend_tokens: Callable[..., Part | None]
    write: Callable[..., None]
    append: Callable[..., bool]
    advance: Callable[..., Tensor | None]
    shift_windows: Callable[..., tuple[Tensor, Tensor]]
    runs: Callable[..., Tensor]
    vector_dots: Callable[..., Tensor]
    code_dots: Callable[..., Tensor]
    shares: Callable[..., Tensor]
    largest: Callable[..., Tensor]
    choose: Callable[..., Tensor]
    regroup: Callable[..., Tensor]
    received: Callable[..., Tensor]

    def serves(self, device: torch.device) -> bool:
        """Whether there are kernels of this kind for a device, installed or not."""
        raise NotImplementedError

    def missing(self) -> str | None:
        """Why this machine has none of these kernels, and what to do; None: it has them."""
        return None

    def installed(self) -> str:
        """What there is of these kernels, in words."""
        return "installed"

    def obstacle(self, operation: str, case: Case) -> str | None:
        """Why an operation is not served on a device that this backend `serves`; None: it is."""
        raise NotImplementedError

    def told(self, device: torch.device) -> str:
        """The kernels for a device, in words."""
        return self.name

    def joins(self, codec: PageCodec, case: Case, tokens: Tokens) -> bool:
        """Whether `attend` takes exact tokens together with pages."""
        return False
