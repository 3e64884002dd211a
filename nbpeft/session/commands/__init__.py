"""The commands of a session: plain functions with the session's context, grouped by topic."""
