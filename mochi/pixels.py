"""How pixels are normalised, everywhere: (x - mean) / std of RGB in [0, 1], with ImageNet's numbers."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
