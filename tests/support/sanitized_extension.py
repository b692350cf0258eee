"""A pytest plugin that loads the extension from NCSN_FAST_EXTENSION instead of the package's own.

`pytest -p sanitized_extension` runs tests on a build with sanitizers. It lies elsewhere, so that no
other process loads it; processes that the tests start are not preloaded either.
"""

import importlib.util
import os
import sys

os.environ.pop("LD_PRELOAD", None)
NAME = "ncsn_fast._C"
_spec = importlib.util.spec_from_file_location(NAME, os.environ.pop("NCSN_FAST_EXTENSION"))
assert _spec is not None
assert _spec.loader is not None
sys.modules[NAME] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(sys.modules[NAME])
