"""What is launched, decided from shapes alone, so that a step can be recorded once and replayed."""

from __future__ import annotations

from functools import cache

import torch

from kvcomp.kernels.contract import PageCodec
from kvcomp.segments import ReadMap

MOST_ROWS = 64  # query rows that a program has in registers
FEWEST_ROWS = 16  # what tensor cores take
WIDE = 256  # channels of keys; with more, as of latents, a program has memory for the fewest rows and a small tile
PROGRAMS = 4  # per processor: as many as have room there, and their tails then even out
MOST_PROGRAMS = 8  # of one warp each
LEAST = 256  # tokens of a split: fewer cost more to merge than they save
FULL = 4096  # bytes of a tile of exact keys


def blocked(rows: int, centred: bool = False, k_dim: int = 0) -> int:
    """Rows of a program for so many query rows of a stream, of keys [k_dim]; half as many at most where centres take
    registers."""
    most = FEWEST_ROWS if k_dim > WIDE else MOST_ROWS // 2 if centred else MOST_ROWS
    return min(max(1 << (rows - 1).bit_length(), FEWEST_ROWS), most)


def together(centred: bool, rows: int, several: bool = False) -> bool:
    """Whether one launch attends to pages and to exact tokens. Some registers would spill with many rows and centres of
    pages, or with queries of their own and `several` chunks a side."""
    return not (several or (centred and blocked(rows) > FEWEST_ROWS))


def maps(codec: PageCodec, streams: int) -> tuple[ReadMap, ReadMap] | None:
    """What kernels multiply queries of so many streams with, and outputs; None: the codec has to."""
    found = codec.read_maps(streams)
    if found is None or found[1].mean is not None or any(read.order is not None for read in found):
        return None
    return found


def split_pages(
    streams: int,
    rows: int,
    pages: int,
    page_size: int,
    processors: int,
    k_dim: int = 0,
    programs: int = MOST_PROGRAMS,
) -> int:
    """Pages of a split: as few as give every one of the device's `processors` something to do, `LEAST` tokens at least.

    pages: of the longest stream. programs: of a processor; with the most there may be, splits are as many as can be.
    Shorter ones have idle splits, which end at once.
    """
    splits = max(programs * processors // (streams * -(-rows // blocked(rows, k_dim=k_dim))), 1)
    return max(-(-pages // splits), -(-LEAST // page_size))


def split_keys(heads: int, rows: int, keys: int, processors: int) -> int:
    """Keys that one program of `received.lse_kernel` takes, for so many query heads of `rows` queries each."""
    splits = max(PROGRAMS * processors // (heads * -(-rows // blocked(rows))), 1)
    return max(-(-keys // splits), 4 * LEAST)


def tokens_tile(token_bytes: int) -> int:
    """Exact tokens at once, of so many bytes of keys each."""
    return 64 if token_bytes * 64 <= FULL else 32 if token_bytes * 32 <= FULL else 16


@cache
def processors(device: torch.device) -> int:
    """How many programs run at once, at least."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
