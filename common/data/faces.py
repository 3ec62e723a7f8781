"""The Olivetti faces, as scikit-learn keeps them on the disk."""

import torch

from common.counter import permutation, stream
from common.data.datasets import Splits
from common.data.memory import numbered

PEOPLE = 40


def olivetti(test: int = 10, split_seed: int = 0) -> Splits:
    """The Olivetti faces (AT&T Laboratories Cambridge): 40 people, ten grey images of each, 64 x 64.

    ``test`` people, drawn by ``split_seed``, are for testing alone: to verify on faces that training has not seen. Both
    splits share the classes, and no class has images in both. Nothing is downloaded.

    scikit-learn's file is a pickle, which can run code when it is read. So no key names it, since a config may come
    from a stranger: it is read where scikit-learn has put it, in its own folder (``~/scikit_learn_data``, or
    ``$SCIKIT_LEARN_DATA``). Raises ValueError where it is not there, or damaged.
    """
    if not 0 <= test <= PEOPLE - 2:
        raise ValueError(f"test: {test} of {PEOPLE} people. Give 0 to {PEOPLE - 2}: two at least to train on.")
    # Here and not above: other sets need no scikit-learn.
    from sklearn.datasets import fetch_olivetti_faces, get_data_home

    home, again = get_data_home(), "python -c 'from sklearn.datasets import fetch_olivetti_faces as f; f()'"
    try:
        faces = fetch_olivetti_faces(download_if_missing=False)
    except OSError as error:
        raise ValueError(f"{home} holds no Olivetti faces. Get them once (4 MB): {again}") from error
    except Exception as error:
        raise ValueError(f"the Olivetti faces in {home} are damaged: {error}. Remove olivetti_py3.pkz there and get "
                         f"them again: {again}") from error
    images_ncHW = torch.from_numpy(faces.images * 255).round().byte().unsqueeze(1)
    labels_n, classes = torch.from_numpy(faces.target).long(), [f"person {number}" for number in range(PEOPLE)]
    tested_n = torch.isin(labels_n, permutation(PEOPLE, split_seed, stream("olivetti split"))[:test])
    train_set, test_set = (numbered("olivetti", images_ncHW[part], labels_n[part], classes, part)
                           for part in ((~tested_n).nonzero()[:, 0], tested_n.nonzero()[:, 0]))
    return Splits(train_set, test_set if test else None)
