"""Distributed training of DCGAN (Radford et al. 2015, arXiv 1511.06434) on one GPU or many."""

__version__ = "0.1.0"
