"""The papers, in BibTeX."""

HADSELL = """\
@inproceedings{hadsell2006dimensionality,
  title     = {Dimensionality Reduction by Learning an Invariant Mapping},
  author    = {Hadsell, Raia and Chopra, Sumit and LeCun, Yann},
  booktitle = {IEEE Conference on Computer Vision and Pattern Recognition (CVPR)},
  year      = {2006}
}"""
