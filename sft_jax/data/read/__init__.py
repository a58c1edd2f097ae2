"""Files to rows, and rows to what they say."""
