"""What benchmarks/offload.py measures, part by part."""
