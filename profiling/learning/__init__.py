"""The parts of `profiling.bench learning`: two models train on equal processor time and are measured alike."""
