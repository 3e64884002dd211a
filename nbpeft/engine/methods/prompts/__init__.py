"""Methods that put trained vectors before the input, or before the keys and values of attention."""
