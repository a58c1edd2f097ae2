"""Local folders and buckets."""
