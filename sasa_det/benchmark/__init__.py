"""Time and memory of attention beside convolution and other formulations, in one run."""
