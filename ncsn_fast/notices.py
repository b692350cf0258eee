"""Notices: lines about a choice that is not the default, seen where logging is not configured."""

from __future__ import annotations

import logging
import sys
from typing import Any

_said: set[str] = set()


def notice(log: logging.Logger, text: str, *values: Any) -> None:
    """Logs a line as INFO; prints it to standard error, once, where no handler would show it.

    Commands configure logging, Python's default does not: it shows warnings and drops the rest.
    """
    if log.hasHandlers():
        log.info(text, *values)
        return
    line = text % values if values else text
    if line not in _said:
        _said.add(line)
        print(f"ncsn_fast: {line}", file=sys.stderr)
