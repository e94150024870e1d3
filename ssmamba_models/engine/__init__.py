"""What runs a model over data: encoders made ready, folders embedded."""
