"""Command-line options of the sampling methods, which follow from the table of methods."""

import dataclasses
import inspect
import re
import subprocess
import sys
from typing import get_args, get_type_hints

import pytest
from drawing import tiny

from ncsn_fast import Sampler
from ncsn_fast.cli import command
from ncsn_fast.cli.command import UsageError
from ncsn_fast.cli.edit_options import Colourise, Inpaint
from ncsn_fast.cli.evaluate_options import EvaluateOptions
from ncsn_fast.cli.options import ModelOptions, SamplingOptions, with_method_options
from ncsn_fast.evaluation import likelihood
from ncsn_fast.inference import editing
from ncsn_fast.inference.sampling_params import SamplingParams, takes
from ncsn_fast.samplers import choices, few_step, methods
from ncsn_fast.samplers.correctors import CORRECTORS
from ncsn_fast.samplers.methods import METHODS, OPTIONS, Method, Option


def noisy(model, levels, *, churn: float = 2.0, wobble: int = 3, mirror: bool = False):
    """A method like euler, with options of its own."""
    if wobble < 0:
        raise ValueError(f"wobble must be at least 0; got {wobble}")
    ladder = levels.between_the_ends(model)
    return few_step.euler(ladder, churn=few_step.Churn(churn + wobble))


@pytest.fixture
def another(monkeypatch):
    """One more method, "noisy", with two options that no other has."""
    monkeypatch.setitem(METHODS, "noisy", Method(noisy, "Euler's method with noise", steps=6))
    monkeypatch.setitem(OPTIONS, "wobble", Option("How much it wobbles."))
    monkeypatch.setitem(OPTIONS, "mirror", Option("Flip what it draws."))

    @dataclasses.dataclass(frozen=True)
    @with_method_options
    class Options(SamplingOptions):
        """As SamplingOptions, of the methods of the moment."""

    return lambda line: command.parse(Options, line.split(), "draw", "Draws.")


def help_of(parse, capsys, monkeypatch) -> dict[str, str]:
    """What --help says of each option."""
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    assert stop.value.code == 0
    lines = [line.strip("│| ") for line in capsys.readouterr().out.splitlines()]
    told = re.split(r"  (?=--[a-z])", "  ".join(lines))
    return {text.split()[0].rstrip(","): text for text in told[1:]}


def test_a_new_methods_options_are_on_the_command_line(another, capsys, monkeypatch):
    told = help_of(another, capsys, monkeypatch)
    assert "How much it wobbles. (default: 3 for noisy)" in told["--wobble"]
    assert "(default: 0 for euler, heun; 2 for noisy)" in told["--churn"]
    assert "--no-mirror" in told["--mirror"]
    assert "6 for noisy" in told["--steps"]
    assert "noisy: Euler's method with noise" in told["--method"]
    options = another("--method noisy --wobble 1 --churn 0.5 --steps 4").method_options()
    expected = {"method": "noisy", "steps": 4, "churn": 0.5, "wobble": 1, "mirror": False}
    assert options == expected
    # Switches that are not given go only to methods that have them.
    assert another("").method_options() == {"method": "ald", "steps": None, "denoise": True}


def test_a_new_method_draws_by_name(another):
    sampler = Sampler(tiny(), engine="eager", batch_size=2)
    drawn = sampler.sample(2, **another("--method noisy --wobble 1 --quiet").sampling())
    assert sampler.report.nfe == 6
    assert (drawn == sampler.sample(2, method="euler", steps=6, churn=3.0, progress=False)).all()
    with pytest.raises(ValueError, match="wobble must be at least 0; got -1"):
        sampler.sample(2, **another("--method noisy --wobble -1").sampling())


def test_errors_name_a_new_methods_options(another):
    with pytest.raises(UsageError, match="'ald' has no option wobble; it has sigmas, epsilon"):
        another("--wobble 1")
    with pytest.raises(UsageError, match=r"'noisy' has no option eta; .*churn, wobble, mirr"):
        another("--method noisy --eta 1")
    with pytest.raises(UsageError, match="'noisy' has no option denoise"):
        another("--method noisy --no-denoise")
    with pytest.raises(UsageError, match="--wobble"):
        another("--method noisy --wobble 1.5")


def test_help_and_signatures_of_python_show_a_new_methods_options(another):
    @takes(methods.parameters(), explained=methods.describe_options())
    def draw(n: int = 1, *, churn: str = "own", **options: object) -> None:
        """Draws."""

    assert "wobble: How much it wobbles. (default: 3 for noisy)" in " ".join(draw.__doc__.split())
    shown = inspect.signature(draw).parameters
    assert (shown["wobble"].default, shown["churn"].default) == (3, "own")
    assert shown["wobble"].kind is inspect.Parameter.KEYWORD_ONLY


def test_an_option_without_a_help_text_is_refused(monkeypatch):
    monkeypatch.setitem(METHODS, "noisy", Method(noisy, "Euler's method with noise"))
    with pytest.raises(ValueError, match="option wobble of method 'noisy' has no help text; give"):
        methods.options()


@pytest.mark.slow
def test_a_new_method_reaches_the_command_sample():
    program = (
        "from ncsn_fast.samplers import methods, program_methods as p\n"
        "def mine(model, levels, *, wobble: float = 0.25): return p.euler(model, levels)\n"
        "methods.METHODS['mine'] = methods.Method(mine, 'my own')\n"
        "methods.OPTIONS['wobble'] = methods.Option('How much it wobbles.')\n"
        "from ncsn_fast import sample\n"
        "sample.main(['--help'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert "(default: 0.25 for mine)" in done.stdout


def test_choices_are_those_of_what_they_choose():
    """Those of the command line are apart, as it lists them before torch is imported."""
    assert get_args(choices.Chain) == tuple(CORRECTORS)
    for options, name, chosen in (
        (EvaluateOptions, "trace", likelihood.Trace),
        (Inpaint, "variant", editing.Inpainting | None),
        (Colourise, "how", editing.Restoration | None),
    ):
        assert get_type_hints(options)[name] == chosen, name


def test_the_command_line_has_the_options_of_the_methods():
    fields = [f.name for f in dataclasses.fields(SamplingOptions)]
    shared = [f.name for c in (ModelOptions, SamplingParams) for f in dataclasses.fields(c)]
    of_methods = [name for name, row in OPTIONS.items() if row.command_line]
    assert fields == [*shared, *of_methods]
    given = SamplingOptions(method="pc", steps=3, corrector="mala", denoise=False, quiet=True)
    assert given.sampling() == {
        "seed": 0, "start": 0, "progress": False, "method": "pc", "steps": 3, "corrector": "mala",
        "denoise": False,
    }  # fmt: skip
