"""A small arithmetic model and everything that made it: the subject of `make demo` and of the end-to-end tests."""
