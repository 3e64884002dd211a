"""Methods that train few numbers and have fixed directions: random, of the weight, or shared by layers."""
