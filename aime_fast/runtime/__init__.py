"""How code runs: device and compile mode, CUDA graphs, roll-outs, profiler spans, provenance of results."""
