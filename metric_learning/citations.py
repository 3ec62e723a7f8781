"""The papers, in BibTeX."""

HADSELL = """\
@inproceedings{hadsell2006dimensionality,
  title     = {Dimensionality Reduction by Learning an Invariant Mapping},
  author    = {Hadsell, Raia and Chopra, Sumit and LeCun, Yann},
  booktitle = {IEEE Conference on Computer Vision and Pattern Recognition (CVPR)},
  year      = {2006}
}"""

WEN = """\
@inproceedings{wen2016discriminative,
  title     = {A Discriminative Feature Learning Approach for Deep Face Recognition},
  author    = {Wen, Yandong and Zhang, Kaipeng and Li, Zhifeng and Qiao, Yu},
  booktitle = {European Conference on Computer Vision (ECCV)},
  year      = {2016}
}"""
