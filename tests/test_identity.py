"""Which run a checkpoint is of: what may differ between its config and that of the run which goes on."""

from common.identity import differences
from common.sections import complete
from tests import tiny


def test_a_setting_that_is_newer_than_the_checkpoint_does_not_part_it_from_its_run(tmp_path):
    """A run of before ``encoder.unit`` goes on; one that now asks for other features does not."""
    def config(*overrides):
        made = tiny.settings(tmp_path, tmp_path, of="instdisc")
        for override in overrides:
            made.override(override)
        return complete(made)

    now = config()
    before = "".join(line for line in now.text().splitlines(True) if "unit:" not in line)
    assert before != now.text() and differences(before, now) == ""
    assert differences(before, config("method.encoder.unit=false")) == "method.encoder.unit was None and is False"
    assert "method.temperature" in differences(before, config("method.temperature=0.3"))
