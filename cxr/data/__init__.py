"""From an archive's files to batches on a worker: decoding, resumable work, shards, sampling, loading."""
