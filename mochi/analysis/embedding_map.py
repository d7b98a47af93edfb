"""Features in two dimensions."""

import numpy as np
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

PERPLEXITY = 30.0
"""Van der Maaten & Hinton 2008 recommend 5 to 50."""


def project_2d(features: NDArray[np.float32]) -> tuple[NDArray[np.float64], str]:
    """Place images in the unit square, similar ones close together.

    Args:
        features: (M, C) unit vectors.

    Returns:
        (M, 2) coordinates from 0 to 1, and the method: t-SNE, or PCA for fewer than 10 images.
    """
    num = len(features)
    if num < 3 or features.shape[1] < 2 or not np.ptp(features, axis=0).any():
        return np.column_stack([(np.arange(num) + 0.5) / max(num, 1), np.full(num, 0.5)]), "in a row"
    if num < 10:
        points, method = PCA(2, svd_solver="full").fit_transform(features), "PCA"
    else:
        perplexity = min(PERPLEXITY, (num - 1) / 3)
        tsne = TSNE(2, init="pca", perplexity=perplexity, max_iter=500, random_state=0, n_jobs=1)
        points, method = tsne.fit_transform(features), f"t-SNE, perplexity {perplexity:g}"
    points = points - points.min(0)
    return points / np.maximum(points.max(0), 1e-12), method
