"""What is visible, what is restored, and the loss: one file an objective."""
