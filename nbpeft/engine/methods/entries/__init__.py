"""Methods that train some entries of a weight, or of a transform of it."""
