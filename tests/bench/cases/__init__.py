"""The benchmarks, a module each; the module's name is the benchmark's."""
