"""Hooks of mkdocs: pages outside docs/, and links out of it.

The pages read the same on a repository's web view and on the site. There, README is the first page,
links to files that are no pages become their names, and notebooks have been run.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.plugins import event_priority
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
# Page of the site -> file outside docs/.
OUTSIDE = {
    "index.md": "README.md",
    "ARCHITECTURE.md": "ARCHITECTURE.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "SECURITY.md": "SECURITY.md",
    "rules-of-benchmarks.md": "benchmarks/README.md",
    "model-card.md": "ncsn_fast/assets/digits/README.md",
    **{
        f"{path.parent.name}-card.md": str(path.relative_to(ROOT))
        for path in sorted((ROOT / "ncsn_fast" / "assets").glob("*/README.md"))
        if path.parent.name != "digits"
    },
}
NOTEBOOKS = [path.relative_to(ROOT).as_posix() for path in sorted(ROOT.glob("notebooks/*.ipynb"))]
_LINK = re.compile(r"(!?\[[^\]]*\])\(([^)\s:#]+)(#[^)\s]*)?\)")
_CODE = re.compile(r"(^```.*?^```$|`[^`\n]*`)", re.MULTILINE | re.DOTALL)


@event_priority(100)  # before the plugin that makes pages of notebooks
def on_files(files: Any, config: Any) -> Any:
    """Adds the pages outside docs/."""
    for page, path in OUTSIDE.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / path)))
    for path in NOTEBOOKS:  # their plugin wants files of a folder
        files.append(File(path, str(ROOT), config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turns links of the repository into links of the site."""
    here = page.file.src_uri
    if here.endswith(".ipynb"):
        return markdown
    source = ROOT / OUTSIDE.get(here, f"docs/{here}")
    parts = _CODE.split(markdown)
    return "".join(
        part if part.startswith("`") else _LINK.sub(lambda m: _link(m, source, here), part)
        for part in _with_code_in_links(parts)
    )


def _with_code_in_links(parts: list[str]) -> list[str]:
    """Joins short code with the text around it, so that only blocks are left as they are."""
    joined = [""]
    for part in parts:
        if part.startswith("```"):
            joined += [part, ""]
        else:
            joined[-1] += part
    return joined


def _link(match: re.Match[str], source: Path, here: str) -> str:
    """Returns a link of a page of the repository as one of the site."""
    text, target, anchor = match[1], match[2], match[3] or ""
    file = (source.parent / target).resolve()
    if not file.exists():
        raise FileNotFoundError(f"{source.relative_to(ROOT)} links to {target}, which is not there")
    path = file.relative_to(ROOT).as_posix()
    pages = {outside: page for page, outside in OUTSIDE.items()} | {n: n for n in NOTEBOOKS}
    uri = pages.get(path, path.removeprefix("docs/") if path.startswith("docs/") else "")
    if not uri:  # a source file, which is no page
        return text.strip("[]")
    return f"{text}({os.path.relpath(uri, Path(here).parent)}{anchor})"
