"""Whether this machine is fit to train: what is installed, what it has, and what stands in the way."""
