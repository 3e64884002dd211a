"""Methods that rotate or reflect the input or output of a layer."""
