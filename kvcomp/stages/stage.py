"""What every stage is: a frozen dataclass whose fields are the arguments of its spec."""

from __future__ import annotations

import inspect
from abc import ABCMeta
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar

from kvcomp.errors import SpecError
from kvcomp.fingerprint import Fingerprint
from kvcomp.text import is_plain, quote

from .arguments import Alias, canonical, converted, label, types_of

if TYPE_CHECKING:
    from kvcomp import Stack

WHOLE = 2**53  # whole numbers of arguments lie within +-WHOLE: beyond every count, within int64 and exact as floats


LEAST_SHARE = 1e-6  # a smaller share of any prompt, or of any head's channels, is nothing


def arg(default: Any, help: str) -> Any:
    """A dataclass field with a default and the one-line help that `kvcomp stacks` prints."""
    return field(default=default, metadata={"help": help})


class StageType(ABCMeta):
    """The class of stage classes: calling one takes aliases of arguments, too, and refuses unknown ones by name."""

    if not TYPE_CHECKING:  # there a stage class takes what its dataclass declares

        def __call__(cls, *values: Any, **arguments: Any) -> Any:
            return super().__call__(*values, **canonical(cls, len(values), arguments))

        def __add__(cls, other: Any) -> Any:
            raise SpecError(f"{cls.__name__} + ...: that is a class: write {cls.__name__}(), with its arguments")

        @property
        def __signature__(cls) -> inspect.Signature:
            """That of the dataclass, for `help` and notebooks."""
            signature = inspect.signature(cls.__init__)
            return signature.replace(parameters=list(signature.parameters.values())[1:])


@dataclass(frozen=True)
class Stage(metaclass=StageType):
    """Base of every stage. Stages are added to a stack: `SnapKV(keep=0.25) + KIVI(bits=4)`.

    name: what specs call it. family: policy, quantizer, selector or window. paper: arXiv ids, or kvcomp where the
    method is ours. aliases: other names of its arguments, besides those of its bases; type checkers know the
    arguments' own names alone.
    """

    name: ClassVar[str] = ""
    family: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    aliases: ClassVar[Mapping[str, str | Alias]] = {}

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

    def __init_subclass__(cls, **given: Any) -> None:
        super().__init_subclass__(**given)
        if "__repr__" not in vars(cls):  # or the dataclass would make one that shows every argument
            cls.__repr__ = Stage.__repr__  # type: ignore[method-assign]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.shown().items())})"

    def __add__(self, other: Stage | Stack) -> Stack:
        """The stack of this stage and then `other`, as " + " in a spec.

        Raises:
            SpecError: `other` is neither a stage nor a stack, or the two cannot work together.
        """
        from kvcomp import Stack  # through the package: a stack is made of stages, not a stage of stacks

        return Stack((self,)) + other

    if not TYPE_CHECKING:  # which refuses what is added in vain

        def __radd__(self, other: Any) -> Any:
            """Only reached where the left operand is neither a stage nor a stack: a SpecError."""
            from kvcomp import Stack

            return other + Stack((self,))

    def shown(self) -> dict[str, Any]:
        """The arguments by which specs and `repr` name the stage: the first one, and those that are not the default."""
        found = {}
        for i, f in enumerate(fields(self)):
            value = getattr(self, f.name)
            if f.name not in self.implied and (value != f.default or (i == 0 and value is not None)):
                found[f.name] = value
        return found

    def __post_init__(self) -> None:
        """Refuse what no argument may be. A subclass checks its own arguments and calls this."""
        accepted = types_of(type(self))
        for argument in (f.name for f in fields(self)):
            value = converted(label(type(self)), argument, getattr(self, argument), accepted[argument])
            object.__setattr__(self, argument, value)
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
