"""One module per source, named as the source; its `collect(config, cache)` lists its images."""
