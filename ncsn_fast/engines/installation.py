"""Identity of this installation of the package, for the keys of caches."""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path

from ncsn_fast.ops.extension import _C


@functools.cache
def digest() -> str:
    """Returns a hash of name, size and time of every source file and of the compiled extension."""
    folder = Path(_C.__file__).parent
    found = sorted([Path(_C.__file__), *folder.rglob("*.py")])
    stats = [(str(p.relative_to(folder)), (s := p.stat()).st_size, s.st_mtime_ns) for p in found]
    return hashlib.sha256(json.dumps(stats).encode()).hexdigest()
