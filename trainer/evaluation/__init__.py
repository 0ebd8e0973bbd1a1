"""Offline evaluation: data sets, splits, metrics and intervals, the same for product and baselines."""
