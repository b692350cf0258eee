"""The campaign of kills, threads and a soak, with few of each."""

import subprocess
import sys

import pytest
from paths import ROOT, load_script

campaign = load_script(ROOT / "tools" / "campaign.py")


@pytest.mark.slow
@pytest.mark.parametrize("section", ["training", "sampling", "soak", "threads"])
def test_short_campaign(section):
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "campaign.py"), section, "--short"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith(f"{section}: {{")


def test_a_difference_ends_the_campaign():
    with pytest.raises(campaign.CampaignError, match="files differ"):
        campaign.require(False, "files differ")
    assert campaign.same({"a": [1, 2]}, {"a": [1, 2]})
    assert not campaign.same({"a": [1, 2]}, {"a": [1, 3]})
