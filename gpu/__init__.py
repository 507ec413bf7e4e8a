"""What a GPU has to prove: tests, speed and quality, by one command (gpu/run.sh); rehearsed on a CPU by the tests."""
