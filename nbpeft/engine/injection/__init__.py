"""From a config to modules in the tree: ask, plan, build, commit.

Door: ``plan`` (which layers, or why not) and ``build`` (the modules, ready to be put in their places).
"""
