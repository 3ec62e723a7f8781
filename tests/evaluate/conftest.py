import pytest

from common.data import digits as digits_splits
from common.evaluate import Features


@pytest.fixture(scope="session")
def splits():
    """scikit-learn's digits: 1,297 to train on, 500 to test on."""
    return digits_splits()


@pytest.fixture(scope="session")
def digits(splits):
    """Features of the digits: their 64 pixels, normalised by the mean and standard deviation of all."""
    train, test = ((images.array.flatten(1).float() / 255 - 0.305) / 0.376 for images in splits)
    return Features(train, splits.train.labels, test, splits.test.labels, "pixels")
