"""Holes and measures that training and evaluation share, and tar shards of pictures."""
