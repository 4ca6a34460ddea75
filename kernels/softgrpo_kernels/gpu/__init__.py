"""The ops in Triton, for CUDA and ROCm. Imported when the first tensor of such a device arrives."""
