"""Methods that rotate or reflect what goes into a layer or comes out of it."""
