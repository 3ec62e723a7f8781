"""The paper, in BibTeX."""

CITATION = """\
@inproceedings{wu2018instdisc,
  title     = {Unsupervised Feature Learning via Non-Parametric Instance Discrimination},
  author    = {Wu, Zhirong and Xiong, Yuanjun and Yu, Stella X. and Lin, Dahua},
  booktitle = {IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)},
  year      = {2018}
}"""
