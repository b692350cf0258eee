"""How long a run takes: what is said of it, when, and what it does not reach in its minutes."""

import itertools
import logging
import math

import pytest
import tiny

from ncsn_fast import train
from ncsn_fast.checkpoints import training_run
from ncsn_fast.training.averages import Decay
from ncsn_fast.training.pace import Pace, foretell, unreached


def clocked(*times: float) -> Pace:
    now = iter(times)
    return Pace(lambda: next(now))


def test_a_run_stops_after_its_minutes(in_tmp, monkeypatch, capsys):
    ticks = itertools.count(step=30.0)
    monkeypatch.setattr("ncsn_fast.training.fit.Pace", lambda: Pace(lambda: next(ticks)))
    assert train.main(tiny.arguments(steps=50, max_minutes=2)) == 0
    said = capsys.readouterr().out
    assert "stopped after 2 minutes and saved: runs/digits\n" in said
    assert "sample from it: python -m ncsn_fast.sample --model runs/digits --method fast" in said
    assert "continue with: the same command and --resume" in said
    assert 0 < training_run.read_run(in_tmp / "runs" / "digits").step < 50


def test_speed_is_that_of_the_steps_after_the_first():
    pace = clocked(0.0, 9.0, 14.0, 19.0, 20.0)
    assert pace.seconds_per_step(1) is None  # compilation
    assert pace.seconds_per_step(2) is None  # too soon
    assert pace.seconds_per_step(3) == pytest.approx((19 - 9) / 2)
    assert pace.seconds_per_step(4) == pytest.approx((20 - 9) / 3)
    quick = clocked(0.0, 3.0, 3.5, 4.0)
    assert quick.seconds_per_step(1) is None
    assert quick.seconds_per_step(10) is None
    assert quick.seconds_per_step(11) == pytest.approx(0.1)


def test_speed_is_that_of_the_steps_after_the_first_minute():
    pace = clocked(0.0, 2.0, 50.0, 62.0, 62.0, 82.0)
    assert pace.seconds_per_step(1) is None
    assert pace.seconds_per_step(5) == pytest.approx(48 / 4)
    assert pace.seconds_per_step(6) == pytest.approx(60 / 5)  # the new mark
    assert pace.seconds_per_step(6) == pytest.approx(60 / 5)
    assert pace.seconds_per_step(16) == pytest.approx(2.0)


def test_time_left_ends_with_the_minutes():
    pace = clocked(0.0, 1.0, 81.0, 81.0, 81.0, 81.0, 81.0, 200.0, 200.0)
    assert pace.left(1, 100) is None
    assert pace.left(11, 100) == pytest.approx(89 * 8)
    assert pace.left(11, 100, minutes=2) == pytest.approx(120 - 81)
    assert pace.left(11, 100, minutes=20) == pytest.approx(89 * 8)
    assert pace.left(51, 100, minutes=2) == 0.0


def test_a_run_says_once_how_long_it_takes(in_tmp, monkeypatch, caplog):
    ticks = itertools.count(step=0.5)  # three readings of the clock a step, at most
    monkeypatch.setattr("ncsn_fast.training.fit.Pace", lambda: Pace(lambda: next(ticks)))
    with caplog.at_level(logging.INFO):
        assert train.main(tiny.arguments(steps=60, warmup=0, log_every=7)) == 0
    said = [r.getMessage() for r in caplog.records if "steps left" in r.getMessage()]
    assert len(said) == 1
    assert said[0].startswith("about 0.")
    assert " min for the 49 steps left, at " in said[0]


def test_what_the_minutes_do_not_reach_is_warned_of():
    config = tiny.train_config(steps=4000, warmup=100, snapshot_every=500, ema=0.9)
    text, warning = foretell(config, 11, 0.75, 0.2)
    assert text == "about 50 min for the 3989 steps left, at 0.75 s each"
    assert warning == ""
    assert foretell(config, 11, 7.5, 0)[0].startswith("about 499 min (8.3 hours) for")
    short = tiny.train_config(steps=4000, warmup=100, snapshot_every=500, max_minutes=1.0)
    text, warning = foretell(short, 10, 0.75, 0.25)
    assert text.endswith("; --max-minutes 1 ends them near step 70")
    assert "near step 70, before the learning rate has risen (--warmup 100) and the" in warning
    assert "and the first checkpoint and samples (--snapshot-every 500): give it more" in warning
    longer = tiny.train_config(steps=4000, warmup=100, snapshot_every=500, max_minutes=9.0)
    assert foretell(longer, 10, 0.75, 0.25)[1] == ""
    assert "near step 10, before" in foretell(short, 10, 0.75, 2.0)[1]


def test_averages_without_a_warm_up_are_warned_of_too():
    assert Decay("ema", 0.999, warmup=True).settled(8) == 0
    steps = Decay("ema", 0.999, warmup=False).settled(8)
    assert 0.999**steps <= 0.05 < 0.999 ** (steps - 1)
    images = Decay("x", halflife=800.0, warmup=False).settled(8)
    assert images == math.ceil(100 * math.log2(20))
    config = tiny.train_config(warmup=0, ema=0.999, ema_warmup=False)
    assert unreached(config, steps) == []
    assert unreached(config, steps - 1) == [
        f"the average forgets the initial weights (step {steps}; --ema-warmup)"
    ]


def test_steps_that_end_in_the_warm_up_are_warned_of_before_the_work(in_tmp, caplog):
    assert train.main([*tiny.arguments(steps=4, warmup=9), "--dry-run"]) == 0
    assert "ends at step 4, before the learning rate has risen (--warmup 9)" in caplog.text
    caplog.clear()
    assert train.main([*tiny.arguments(steps=9, warmup=9), "--dry-run"]) == 0
    assert "before the learning rate" not in caplog.text
