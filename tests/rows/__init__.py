"""The table of families that tests go through, by kind; tests/families.py joins them."""
