"""Where things are kept: checkpoints, tables, shards, files, the hub; and where data is read from."""
