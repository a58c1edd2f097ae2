"""Examples to batches: packing, plan, loader, stream."""
