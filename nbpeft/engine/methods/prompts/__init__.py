"""Methods that put trained vectors in front of the input, or in front of the keys and values of attention."""
