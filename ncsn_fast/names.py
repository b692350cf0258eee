"""Names that a user may have misspelt."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def suggestion(name: object, known: Iterable[str]) -> str:
    """Returns " (did you mean 'NAME'?)" with the known name most like a given one; "" if none is.

    Args:
        name: the name that is not known; of what is no string, nothing is like it.
    """
    if not isinstance(name, str):
        return ""
    names = {each.lower(): each for each in known}
    found = difflib.get_close_matches(name.lower(), names, n=1)
    return f" (did you mean {names[found[0]]!r}?)" if found else ""
