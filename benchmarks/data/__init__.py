"""Augmentation, loading and preparation compared with Pillow, torchvision and lightly; memory of loading.

The Pillow and torchvision alternatives follow the official code of MoCo: image by image.
"""
