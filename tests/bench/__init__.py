"""Every number that the README claims, measured again: `python -m tests.bench [NAME …] [--quick]`.

A benchmark is a module in `cases`: `measure(inputs, quick)` returns figures, `tables(figures)` draws them. Sides run in
fresh processes, alternating A B A B, so that a peak is that of one side and slow minutes of the machine hit both.
Results lie in `results`, one JSON file a benchmark, and are what `--tables` reads. Nothing here is timed by pytest.
"""
