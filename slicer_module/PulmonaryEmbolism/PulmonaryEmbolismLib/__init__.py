"""The parts of the Pulmonary Embolism module: client, jobs, images and review know no Slicer; scene knows MRML only."""
