"""Image quality as a number: feature extractors, distances between sets of features, scores of a generator."""
