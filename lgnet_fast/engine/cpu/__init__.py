"""Running plans on a CPU by the C++ kernels of `csrc/`: choice of kernels, weights, execution, tuning."""
