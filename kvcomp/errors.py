"""Errors and warnings of kvcomp. Every message names the argument, the value and what would be accepted."""


class KvcompError(ValueError):
    """Base of all errors that kvcomp raises on purpose."""


class SpecError(KvcompError):
    """A stack spec that does not parse, names an unknown stage or argument, or combines what cannot work."""


class UnsupportedError(KvcompError):
    """A model, mask or operation for which a compressed cache could not give the right answer."""


class KvcompWarning(UserWarning):
    """Something legal that the user probably wants to know."""
