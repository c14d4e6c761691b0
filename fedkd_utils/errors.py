"""What is said to people when something is wrong."""

from __future__ import annotations


def one_line(error: BaseException) -> str:
    """An error's message without line breaks, at most some lines of a terminal long."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 600 else text[:597] + "..."


def printable(text: object) -> str:
    """Text for any terminal or file: bytes that are no UTF-8, line breaks and the like are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


class VolumeError(ValueError):
    """A volume that cannot be used; the message names the file, the fault and the remedy."""


class CohortError(ValueError):
    """A cohort or site that cannot be used; the message names the folder, the fault and the remedy, in one line."""

    def __init__(self, text: str) -> None:
        super().__init__(printable(text))
