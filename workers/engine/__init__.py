"""The generation engine: vLLM, or the simulated one that queue and fault tests run on."""
