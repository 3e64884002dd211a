"""The tests. This file makes them a package: IPython 7 has one of the same name on the path of its kernels."""
