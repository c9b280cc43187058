"""STEGO on Ray: unsupervised semantic segmentation of large piles of images.

Importing this package imports neither torch nor ray; take what you need from its modules.
"""

__version__ = "0.1.0"
