"""Makes docs/editing.png: the grids of the first four `edit` commands of docs/tutorials/editing.md.

`python tools/write_pictures.py`
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

from PIL import Image

from ncsn_fast import edit

ROOT = Path(__file__).resolve().parent.parent
BLOCKS, GAP = 4, 20


def commands() -> list[str]:
    """Returns the arguments of the page's first `edit` commands."""
    page = ROOT / "docs" / "tutorials" / "editing.md"
    lines = re.findall(r"^python -m ncsn_fast\.edit (.*)$", page.read_text(), re.M)
    return lines[:BLOCKS]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        grids = []
        for i, line in enumerate(commands()):
            path = Path(folder) / f"{i}.png"
            words = [str(path) if w.endswith(".png") else w for w in line.split()]
            edit.main([*words, "--engine", "eager", "--quiet"])
            grids.append(Image.open(path).convert("L"))
        width, height = grids[0].size
        picture = Image.new("L", (2 * width + GAP, 2 * height + GAP), 255)
        for i, grid in enumerate(grids):
            picture.paste(grid, (i % 2 * (width + GAP), i // 2 * (height + GAP)))
        picture.resize((2 * picture.width, 2 * picture.height), Image.Resampling.NEAREST).save(
            ROOT / "docs" / "editing.png", optimize=True
        )


if __name__ == "__main__":
    main()
