"""Methods that train what a layer has besides its matrix: scales, biases, norms, rows of an embedding."""
