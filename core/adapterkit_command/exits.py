"""What the command's exit status says."""

from enum import IntEnum


class Exit(IntEnum):
    """The exit statuses; scripts can rely on them."""

    OK = 0, "done"
    ERROR = 1, "it cannot be done as asked; the message says why, and what was there before is untouched"
    USAGE = 2, "the command line itself is wrong"
    INTERNAL = 3, "a fault of adapterkit's, or of a library's; `--debug` shows the traceback"
    DIFFERENT = 4, "with `diff --exit-code`: the adapters differ"
    INTERRUPTED = 130, "interrupted by Ctrl-C"
    PIPE = 141, "what read the output has closed it, as `head` does"

    says: str

    def __new__(cls, value: int, says: str) -> "Exit":
        """A member is its number, and knows its sentence."""
        member = int.__new__(cls, value)
        member._value_, member.says = value, says
        return member
