"""What the method is compared with: pooled slab probabilities, PENet, and a 3D CNN with a ConvLSTM."""
