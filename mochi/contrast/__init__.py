"""The contrastive loss, its queue and rules of negatives, and MoCo."""
