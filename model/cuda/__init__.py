"""What is only for CUDA: kernels, recordings, copies, and a device without a GPU to count on."""
