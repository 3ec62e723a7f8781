"""What an evaluator embeds for others."""

import torch

from common.data import Images
from common.data.recipes import digits
from common.encoder import Encoder
from common.evaluate.evaluator import embed

VIEWS = digits()


def test_each_image_has_its_features_in_its_own_row_though_others_cannot_be_read(splits):
    train = splits.train
    images = Images(train.name, train.keys[:21], train.labels[:21], train.classes, train.array[:21])
    images.bad = {3: "planted", 10: "planted"}
    encoder = Encoder(torch.nn.Flatten(), torch.nn.Linear(64, 5))
    v_nC = embed(encoder, images, VIEWS, batch_size=8, workers=0, device=torch.device("cpu"))   # the last has 5
    assert not v_nC.requires_grad
    torch.testing.assert_close(v_nC.norm(dim=1), torch.ones(21))
    for i in set(range(21)) - images.bad.keys():
        torch.testing.assert_close(v_nC[i], encoder(VIEWS.evaluation_batch(images.array[[i]]))[0].detach())
    assert not torch.equal(v_nC[3], v_nC[10])
