"""Graphs that ship with the package."""

import json
import subprocess
import sys

import pytest
from paths import ROOT

from ncsn_fast.checkpoints.loading import load
from ncsn_fast.engines.lowering import lower as lower_module
from ncsn_fast.engines.lowering import stored
from ncsn_fast.engines.static_engine import lowered
from tools import store_graphs


@pytest.mark.parametrize("source", store_graphs.MODELS, ids=lambda source: source.name)
def test_the_graph_that_ships_is_what_lowering_gives(source):
    key, structure = store_graphs.of(load(source))
    path = stored.SHIPPED / f"{key}.json"
    assert path.exists(), "run `python -m tools.store_graphs`"
    assert json.loads(path.read_text())["graph"] == json.loads(json.dumps(structure))


def test_nothing_else_ships():
    assert len([*stored.SHIPPED.iterdir()]) == len(store_graphs.MODELS)


def test_a_model_that_ships_is_not_lowered(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(stored, "_known", {})
    monkeypatch.setattr(lower_module, "_lower", None)
    of = load("digits")
    graph = lowered(of, of.config.image_size)
    assert graph.ops[0].spec.weight.data_ptr() == of.net.begin_conv.weight.data_ptr()
    assert not [*tmp_path.iterdir()]


@pytest.mark.slow
def test_a_model_that_ships_is_loaded_without_the_parts_of_torch_compile(tmp_path):
    """They take longer than the model's first picture."""
    program = (
        "import sys, ncsn_fast; from ncsn_fast.engines.static_engine import lowered; "
        "of = ncsn_fast.load('digits'); lowered(of, of.config.image_size); "
        "sys.exit(sorted({'torch._dynamo', 'torch._inductor', 'sympy'} & {*sys.modules}) or None)"
    )
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")
