"""DICOM in and out: DICOMweb archives, exports and discs, sending results."""
