"""What the terminal shows while torch.export works."""

import sys
import threading

import pytest
import torch

from ncsn_fast.engines.lowering.export import Exported
from ncsn_fast.engines.lowering.graph import UnsupportedNetwork


class PrintsElsewhere(torch.nn.Module):
    """Another thread prints to stderr while torch.export reads this network, which it refuses."""

    def forward(self, x):
        thread = threading.Thread(target=lambda: print("a progress bar", file=sys.stderr))
        thread.start()
        thread.join()
        return x * float(x.sum())  # a number that depends on the image


def test_what_export_prints_is_kept_off_the_terminal_and_nothing_else(capsys):
    before = sys.stderr
    with pytest.raises(UnsupportedNetwork, match=r"torch\.export does not take"):
        Exported(PrintsElsewhere(), (torch.zeros(2, 1, 4, 4),))
    assert sys.stderr is before
    assert capsys.readouterr().err == "a progress bar\n"
