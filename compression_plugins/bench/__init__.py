"""Times of kernels and schemes on this machine: `compression-plugins bench kernels|schemes`."""
