"""A cache of keys and values that is spread over ranks."""
