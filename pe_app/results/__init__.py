"""Detections as people and programs open them: files, pages, worklists, DICOM."""
