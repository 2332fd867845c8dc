"""One run for every optimizer, adapter, learning rate and seed, and one report of all of them."""
