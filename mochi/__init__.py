"""MoCHi: hard negative mixing for contrastive learning, from raw images to the paper's tables."""
