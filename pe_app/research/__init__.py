"""What a hospital never calls: the paper's comparison and baselines, benchmarks, the starter model's recipe."""
