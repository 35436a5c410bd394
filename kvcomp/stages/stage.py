"""What every stage is: a frozen dataclass whose fields are the arguments of its spec."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from kvcomp.errors import SpecError
from kvcomp.fingerprint import Fingerprint
from kvcomp.text import is_plain, quote

WHOLE = 2**53  # whole numbers of arguments lie within +-WHOLE: beyond every count, within int64 and exact as floats


LEAST_SHARE = 1e-6  # a smaller share of any prompt, or of any head's channels, is nothing


def arg(default: Any, help: str) -> Any:
    """A dataclass field with a default and the one-line help that `kvcomp stacks` prints."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Stage:
    """Base of every stage."""

    name: ClassVar[str] = ""
    family: ClassVar[str] = ""
    paper: ClassVar[str] = ""

    @property
    def page_multiple(self) -> int:
        """The page size must be a multiple of this many tokens; 1 when the stage does not care."""
        return 1

    @property
    def default_window(self) -> tuple[int, int]:
        """(sinks, recent) that the method publishes; used where the stack has no `window(...)` of its own."""
        return 0, 0

    @property
    def required_sinks(self) -> int:
        """Sinks without which the method is wrong; a smaller explicit `window(sinks=)` is refused."""
        return 0

    @property
    def prefill_chunk(self) -> int | None:
        """Tokens per chunk where the prompt must enter in chunks, each attending to the compressed cache.

        Such a prefill is the stack's own. None: the prompt enters at once, and may share a dense prefill.
        """
        return None

    @property
    def implied(self) -> tuple[str, ...]:
        """Arguments that follow from the others, and that `str(stack)` leaves out."""
        return ()

    def identity(self, argument: str) -> Any:
        """What an argument stands for in the stack's hash: its value, or the content of a file that it names."""
        return getattr(self, argument)

    def serves(self, model: Callable[[], Fingerprint]) -> None:
        """Raise a KvcompError where the stage was made for another model, which `model` tells only when asked."""

    def __post_init__(self) -> None:
        """Refuse what no argument may be. A subclass checks its own arguments and calls this."""
        for argument in (f.name for f in fields(self)):
            value = getattr(self, argument)
            if isinstance(value, int):
                self.check(-WHOLE <= value <= WHOLE, argument, f"a whole number within +-{WHOLE}")
            elif isinstance(value, str):
                self.check(is_plain(value) and bool(value.strip()), argument, "text, without control characters")

    def check(self, ok: bool, argument: str, accepted: str) -> None:
        """Raise a SpecError naming the argument, its value and what is accepted, unless `ok`."""
        if not ok:
            raise SpecError(f"{self.name}({argument}={quote(getattr(self, argument))}): {argument} must be {accepted}")

    def check_share(self, argument: str, least: float = LEAST_SHARE) -> None:
        """Raise a SpecError unless the argument is None or a share from `least` to 1."""
        value = getattr(self, argument)
        self.check(value is None or 0 < value <= 1, argument, "in (0, 1]")
        self.check(value is None or value >= least, argument, f"at least {least:g}: a smaller share is none at all")
