"""The parts of `benchmarks/gpu.py`: its plan, what each section measures, the report."""
