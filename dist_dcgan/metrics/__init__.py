"""Metrics of image quality: feature extractors, distances between sets of features, scores of a generator."""
