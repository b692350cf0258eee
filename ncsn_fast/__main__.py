"""Entry point of `ncsn-fast NAME ...` and `python -m ncsn_fast NAME ...`."""

from __future__ import annotations

import importlib
import sys

from ncsn_fast.cli import command

COMMANDS = {
    "train": "train a model",
    "sample": "draw samples into a grid or into files",
    "edit": "inpaint, interpolate, denoise",
    "evaluate": "figures of merit of a model of the digits",
    "export": "network -> ONNX file",
    "convert": "published .pth or training run -> model folder",
    "cache": "list or clear the cache of compiled engines",
    "doctor": "what runs on this machine",
}


def main() -> int:
    """Dispatches to ncsn_fast.<name>; exit code 2 for an unknown command."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in COMMANDS:
        module = importlib.import_module(f"ncsn_fast.{name}")
        return command.run(lambda: module.main(sys.argv[2:]))
    print(
        "usage: ncsn-fast COMMAND [options]\n",
        *(f"  {n:9} {what}" for n, what in COMMANDS.items()),
        sep="\n",
    )
    if name in ("-h", "--help"):
        return 0
    print(f"\nerror: no command {name!r}", file=sys.stderr)
    return command.USAGE


if __name__ == "__main__":
    sys.exit(main())
