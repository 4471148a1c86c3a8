"""Models as files and on devices: where they come from, chat rendering, embeddings, likelihood."""
