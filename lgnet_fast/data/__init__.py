"""Holes, metrics and tar shards of pictures, for training and evaluation."""
