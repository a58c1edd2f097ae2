"""From rows on disk to batches: sources, chat, examples, packing, loader."""
