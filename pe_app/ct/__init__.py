"""Files become a Volume, and a Volume the slabs that the networks see."""
