"""Entry point of `ncsn-fast NAME ...` and `python -m ncsn_fast NAME ...`."""

from __future__ import annotations

import sys

import ncsn_fast
from ncsn_fast.cli import command
from ncsn_fast.names import suggestion

COMMANDS = {
    "train": "train a model on images",
    "sample": "draw samples, as a grid or as one file each",
    "edit": "inpaint, colourise, super-resolve, deblur, sdedit, guide, interpolate, denoise",
    "evaluate": "FID, KID, inception score of samples; bits per dimension of images",
    "tune": "fit the table of method fast to a model",
    "export": "write the network as an ONNX file or a TensorRT engine",
    "convert": "write a published .pth or a training run as a model folder",
    "cache": "list or clear the cache of compiled engines",
    "doctor": "say what runs on this machine, and what is missing for the rest",
}


def main() -> int:
    """Dispatches to ncsn_fast.<name>; exit code 2 for an unknown command."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in COMMANDS:
        return command.run_module(name, sys.argv[2:])
    if name == "--version":
        print(f"ncsn_fast {ncsn_fast.__version__}")
        return 0
    print(
        "usage: ncsn-fast COMMAND [options]   (ncsn-fast COMMAND --help lists them)\n",
        *(f"  {n:9} {what}" for n, what in COMMANDS.items()),
        sep="\n",
    )
    if name in ("-h", "--help"):
        return 0
    print(f"\nerror: no command {name!r}{suggestion(name, COMMANDS)}", file=sys.stderr)
    return command.USAGE


if __name__ == "__main__":
    sys.exit(main())
