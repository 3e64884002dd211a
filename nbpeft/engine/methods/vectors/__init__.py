"""Methods that train vectors of a layer: scales, biases, norms, rows of an embedding."""
