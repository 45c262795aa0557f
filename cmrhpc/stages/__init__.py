"""One module per stage: it reads shards, calls the maths, and writes one shard."""
