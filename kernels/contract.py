"""What backends of kernels are asked and handed: the operations, the case that decides who serves one, and pages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from kvcomp.attention import Part, Tokens
from kvcomp.layout import PageLayout, Summary
from kvcomp.segments import Sides

MOST_ROWS = 64  # queries of a stream from which on it is faster to decode pages for all of them, and multiply matrices
Reduce = Literal["sum", "max"]


class PageCodec(Protocol):
    """What kernels need of a codec: the methods of `stages.Codec` of the same names."""

    @property
    def rotates(self) -> bool: ...
    def kernel_sides(self) -> Sides | None: ...
    def kernel_input(self, keys: Tensor, values: Tensor, streams: Tensor) -> tuple[Tensor, Tensor] | None: ...
    def decode(self, page: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]: ...
    def read_query(self, queries: Tensor) -> tuple[Tensor, Tensor | None]: ...
    def read_output(self, output: Tensor) -> Tensor: ...


class PagesView(NamedTuple):
    """Pages of a pool uint8 [pages, bytes_per_page]: of ids [S, n] a stream's first counts [S], read as `sides` say.

    in_tokens: counts are of tokens, of a layout that is `tokenwise`, and the last page may be filled in part. sides is
    None where the codec alone can read its pages. token_bias float32 [S, R, n * P]: what is added to each q . k.
    """

    pool: Tensor
    ids: Tensor
    counts: Tensor
    layout: PageLayout
    sides: Sides | None
    in_tokens: bool = False
    token_bias: Tensor | None = None


class Case(NamedTuple):
    """What backends decide by: everything that is known on the host before an operation, and can be hashed.

    rows: queries of a stream; dtype: of queries. The others are of pages that are read or written; rotates: as of their
    codec.
    """

    sides: Sides | None
    device: torch.device
    rows: int = 1
    dtype: torch.dtype | None = None
    layout: PageLayout | None = None
    rotates: bool = False
    lse_of_pages: bool = False
    in_tokens: bool = False

    @property
    def obstacle(self) -> str | None:
        """Why no kernel serves it, whatever the backend; None: one may."""
        if self.rows > MOST_ROWS:
            return f"{self.rows} queries of a stream are more than {MOST_ROWS}"
        if self.layout is None:
            return None
        if self.sides is None:
            return "the codec does not tell kernels how to read its pages"
        return None if all(side.channels for side in self.sides) else "keys or values of no channels"


class Backend:
    """Kernels of one kind, which serve the operations that a subclass overrides.

    `obstacle` decides by the case. Where the signature says so, an operation may still decline what it is handed, with
    None or False for a result: then nothing was done, and the next backend is asked.
    """

    name: str

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

    def attend(
        self,
        queries: Tensor,
        pages: PagesView,
        codec: PageCodec,
        case: Case,
        scale: float,
        softcap: float | None,
        tokens: Tokens | None,
        workspace: Tensor | None,
    ) -> Part | None:
        """Attention of queries [S, R, Dk] over pages, as `reference.attend_pages` has it, and tokens that it `joins`.

        The case is that of these queries and pages.
        """
        raise NotImplementedError

    def attend_tokens(
        self,
        queries: Tensor,
        tokens: Tokens,
        scale: float,
        softcap: float | None,
        prior: Part | None,
        workspace: Tensor | None,
    ) -> Part | None:
        """Attention of queries [S, R, Dk] over exact tokens and what `prior` attended to."""
        raise NotImplementedError

    def write(
        self, pool: Tensor, ids: Tensor, x: tuple[Tensor, Tensor], sides: Sides, layout: PageLayout, rows: Tensor | None
    ) -> None:
        """Encode x, as `Codec.kernel_input` gives it, into records: see `dispatch.encode_pages`."""
        raise NotImplementedError

    def append(self, k: Tensor, v: Tensor, counts: Tensor, keys: Tensor, values: Tensor) -> bool:
        """Write one token of each stream behind those that k and v hold, and count it: see `dispatch.append`."""
        raise NotImplementedError

    def runs(self, x: Tensor, starts: Tensor, width: int) -> Tensor:
        """As `dispatch.runs`."""
        raise NotImplementedError

    def vector_dots(self, queries: Tensor, summary: Summary, names: tuple[str, ...], scale: str | None) -> Tensor:
        """As `select.vector_dots`."""
        raise NotImplementedError

    def code_dots(self, queries: Tensor, summary: Summary, name: str, bits: int) -> Tensor:
        """As `select.code_dots`."""
        raise NotImplementedError

    def shares(self, logits: Tensor, counts: Tensor) -> Tensor:
        """As `select.shares`."""
        raise NotImplementedError

    def largest(self, x: Tensor, wanted: Tensor, width: int) -> Tensor:
        """As `select.largest`."""
        raise NotImplementedError

    def choose(
        self,
        logits: Tensor,
        scale: float,
        counts: Tensor,
        unit: int,
        wanted: Tensor,
        width: int,
        pages: int,
        ends: tuple[int, int],
    ) -> Tensor:
        """As `select.choose`."""
        raise NotImplementedError

    def regroup(self, layout: PageLayout, pool: Tensor, ids: Tensor, tokens: Tensor) -> Tensor:
        """As `select.regroup`."""
        raise NotImplementedError

    def received(
        self,
        queries: Tensor,
        keys: Tensor,
        scale: float,
        visible: Tensor | None,
        softcap: float | None,
        reduce: Reduce,
    ) -> Tensor:
        """As `received.received`."""
        raise NotImplementedError
