"""Adapter methods, one file per method. Each file ends with ``METHOD``, the class that implements the method."""
