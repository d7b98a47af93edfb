"""Augmentation, loading and preparation compared with Pillow, torchvision and lightly; memory of loading.

The others' way is the official code of MoCo: Pillow and torchvision, image by image.
"""
