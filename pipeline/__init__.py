"""pairsieve: from a pool of image-text pairs to the training set worth its compute, with a reason for every sample."""
