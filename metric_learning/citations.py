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

SOHN = """\
@inproceedings{sohn2016improved,
  title     = {Improved Deep Metric Learning with Multi-class N-pair Loss Objective},
  author    = {Sohn, Kihyuk},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2016}
}"""

KHOSLA = """\
@inproceedings{khosla2020supervised,
  title     = {Supervised Contrastive Learning},
  author    = {Khosla, Prannay and Teterwak, Piotr and Wang, Chen and Sarna, Aaron and Tian, Yonglong and
               Isola, Phillip and Maschinot, Aaron and Liu, Ce and Krishnan, Dilip},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2020}
}"""

SCHROFF = """\
@inproceedings{schroff2015facenet,
  title     = {FaceNet: A Unified Embedding for Face Recognition and Clustering},
  author    = {Schroff, Florian and Kalenichenko, Dmitry and Philbin, James},
  booktitle = {IEEE Conference on Computer Vision and Pattern Recognition (CVPR)},
  year      = {2015}
}"""

WANG = """\
@inproceedings{wang2015unsupervised,
  title     = {Unsupervised Learning of Visual Representations using Videos},
  author    = {Wang, Xiaolong and Gupta, Abhinav},
  booktitle = {IEEE International Conference on Computer Vision (ICCV)},
  year      = {2015}
}"""

CHOPRA = """\
@inproceedings{chopra2005learning,
  title     = {Learning a Similarity Metric Discriminatively, with Application to Face Verification},
  author    = {Chopra, Sumit and Hadsell, Raia and LeCun, Yann},
  booktitle = {IEEE Conference on Computer Vision and Pattern Recognition (CVPR)},
  year      = {2005}
}"""

