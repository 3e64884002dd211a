"""The commands of a session: plain functions over its context, one file for each idea."""
