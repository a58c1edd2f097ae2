"""Adapters: one file a method. A method's file ends with ``METHOD``, the class that says what it is."""
