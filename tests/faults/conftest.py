"""What fault tests share: forty photos, and what becomes of a run that nothing interrupts."""

import pytest

from common.run import Run
from tests import tiny


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    return tiny.photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="session")
def straight(root, tmp_path_factory):
    """The folder of a run that nothing interrupted, by method."""
    folder = tmp_path_factory.mktemp("straight")
    for method in tiny.METHODS:
        Run(tiny.settings(root, folder / method, method)).train()
    return folder
