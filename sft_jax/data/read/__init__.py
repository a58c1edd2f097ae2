"""Reads rows from files, and parses rows as conversations, documents or tokens."""
