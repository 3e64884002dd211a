"""Small helpers that everything may use and that know nothing of adapters."""
