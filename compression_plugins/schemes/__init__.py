"""One file per published method: the paper, its parameters, and which codec, memory and collective it is."""
