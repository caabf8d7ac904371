"""What every room may use: errors, files, progress, processes, the device; it knows nothing of medicine."""
