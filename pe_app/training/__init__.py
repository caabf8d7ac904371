"""Both stages learn: prepared data, run folders, the loop, calibration."""
