"""Methods that train few numbers around fixed directions: random, of the weight, or shared by layers."""
