"""Contents of folders and tar shards; holes and metrics for training and evaluation."""
