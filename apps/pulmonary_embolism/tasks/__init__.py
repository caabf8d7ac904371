"""What is asked of the studies: detections, the next study, trainings."""
