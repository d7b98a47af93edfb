"""MoCHi: hard negative mixing for contrastive learning, from raw images to the paper's tables."""

__version__ = "0.2.0.dev0"
