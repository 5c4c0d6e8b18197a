"""`python -m benchmarks MODEL.gguf …`: the engine's figures; see README.md for the others."""

from benchmarks.engine import main

main()
