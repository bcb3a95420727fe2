"""One module for each part of the path that is measured; jobs/bench.py runs them."""
