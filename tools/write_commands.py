"""Writes the options of each command, as --help lists them, into its page of docs/commands/.

    python tools/write_commands.py

With --check it only reports the pages that are out of date.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import sys
from pathlib import Path
from unittest import mock

PAGES = Path(__file__).resolve().parent.parent / "docs" / "commands"
BEGIN, END = "<!-- help:begin -->", "<!-- help:end -->"
SUBCOMMANDS = {"edit": ("inpaint",), "cache": ("clear",)}  # those shown as examples


def pages() -> list[Path]:
    """Returns the pages of commands, each of which has the name of its command."""
    return [path for path in sorted(PAGES.glob("*.md")) if path.stem != "index"]


def help_of(command: str) -> str:
    """Returns --help of a command, and of its subcommands that are examples, as blocks."""
    calls = [(command,), *((command, sub) for sub in SUBCOMMANDS.get(command, ()))]
    return "\n\n".join(_help(*call) for call in calls)


def _help(command: str, *subcommand: str) -> str:
    parse = importlib.import_module(f"ncsn_fast.cli.{command}_options").parse
    said = io.StringIO()
    with (
        mock.patch.dict(os.environ, {"COLUMNS": "100", "NO_COLOR": "1"}),
        contextlib.redirect_stdout(said),
        contextlib.suppress(SystemExit),
    ):
        parse([*subcommand, "--help"])
    lines = [line.rstrip() for line in said.getvalue().splitlines()]
    return "\n".join(["```text", *lines, "```"])


def filled(page: Path) -> str:
    """Returns a page with the present options between its marks."""
    before, _, rest = page.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    return f"{before}{BEGIN}\n{help_of(page.stem)}\n{END}{after}"


def main() -> int:
    """Writes or checks; exit code 1 if a page is out of date."""
    new = {page: filled(page) for page in pages()}
    if "--check" not in sys.argv:
        for page, text in new.items():
            page.write_text(text)
        return 0
    old = [page.name for page, text in new.items() if page.read_text() != text]
    if old:
        print(f"out of date: {', '.join(old)}; run python tools/write_commands.py")
    return bool(old)


if __name__ == "__main__":
    sys.exit(main())
