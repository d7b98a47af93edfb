"""One module for each origin of images; `collect(config)` tells what there is, and `prepare` stores it."""
