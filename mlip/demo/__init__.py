"""The main job, end to end, on what ships with the package: what `mlip demo` runs."""
