"""What the paper compares prefix-tuning with: other things that learn, through the same loop."""
