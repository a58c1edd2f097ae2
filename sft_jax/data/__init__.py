"""The data pipeline: reads rows, renders chats, tokenizes examples, packs sequences and builds batches."""
