"""Running plans on NVIDIA GPUs: launches, CUDA graphs, weights, checks at first use with fallbacks, tuning."""
